"""Learning where the data stay: clients train apart, a server averages what they send."""
