"""What a call of the model does with arguments that are easily given wrong."""

from __future__ import annotations

import numpy as np
from conftest import forward
from test_models import assert_close, placed_rows


def test_restarting_positions_and_returning_segments_are_documents_of_their_own(twin_of):
    twin = twin_of("llama4-scout")
    tokens, (positions, segments) = twin.tokens(), placed_rows()
    packed = twin.forward(twin.model, tokens, positions, segments)[2]
    alone = twin.forward(twin.model, tokens, positions, 0 * segments)[2]
    assert_close(alone, packed)
    back = np.where(segments == 3, 1, segments)
    assert_close(forward(twin.model, tokens, None, back)[2], packed)


def test_ids_outside_the_vocabulary_give_no_number(twin_of):
    twin = twin_of("llama3.2-1b")
    tokens = twin.tokens()
    for wrong in (512, -1):
        spoilt = tokens.copy()
        spoilt[0, 9] = wrong
        found = np.asarray(twin.forward(twin.model, spoilt))
        assert np.isnan(found[0, 9:]).all()
        assert np.isfinite(found[1:]).all()
