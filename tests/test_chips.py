"""TPU generations and slices: names, counts, and what is refused."""

import pytest

from l4jax.planning import chips


@pytest.mark.parametrize(
    ("name", "count", "devices", "hosts", "accelerator", "machine"),
    [
        ("v5p:2x2x1", 4, 4, 1, "v5p-8", "ct5p-hightpu-4t"),
        ("v5p:4x4x4", 64, 64, 16, "v5p-128", "ct5p-hightpu-4t"),
        ("v5p:8x8x16", 1024, 1024, 256, "v5p-2048", "ct5p-hightpu-4t"),
        ("v5p:4x4x12", 192, 192, 48, "v5p-384", "ct5p-hightpu-4t"),
        ("v6e:1x1", 1, 1, 1, "v6e-1", "ct6e-standard-1t"),
        ("v6e:2x4", 8, 8, 1, "v6e-8", "ct6e-standard-8t"),
        ("v6e:16x16", 256, 256, 64, "v6e-256", "ct6e-standard-4t"),
        ("v5e:4x4", 16, 16, 4, "v5litepod-16", "ct5lp-hightpu-4t"),
        ("tpu7x:4x4x4", 64, 128, 16, "tpu7x-128", "tpu7x-standard-4t"),
    ],
)
def test_a_slice_is_counted_as_its_vendor_counts(name, count, devices, hosts, accelerator, machine):
    found = chips.parse(name)
    assert found.name == name
    assert (found.chips, found.devices, found.hosts) == (count, devices, hosts)
    assert (found.accelerator_type, found.machine_type) == (accelerator, machine)


def test_every_listed_slice_parses_and_has_a_machine_type():
    for generation in chips.GENERATIONS.values():
        for shape in generation.shapes:
            found = chips.parse(f"{generation.name}:{shape}")
            assert found.machine_type
            assert found.hosts * found.chips_per_host == found.chips <= generation.max_chips


def test_slices_multiply():
    two = chips.parse("tpu7x:4x4x8", slices=3)
    assert (two.chips, two.devices, two.hosts) == (384, 768, 96)
    assert (two.devices_per_slice, two.hosts_per_slice, two.accelerator_type) == (
        256,
        32,
        "tpu7x-256",
    )


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5p:4x4x8", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),
        ("v6e:8x16", (False, True)),
        ("v5e:4x4", (False, False)),
    ],
)
def test_rings_close_where_the_wiring_does(name, wraps):
    assert chips.parse(name).wraps == wraps


@pytest.mark.parametrize(
    ("name", "slices", "message"),
    [
        ("v9:4x4", 1, "'v9:4x4': the TPU generations are v5e, v5p, v6e, tpu7x"),
        ("v5p", 1, "'v5p' does not exist; slices of v5p are v5p:2x2x1, v5p:2x2x2"),
        ("v5p:8x4x4", 1, "v5p:4x4x8.* and other whole cubes"),
        ("v5p:16x16x28", 1, "does not exist"),
        ("v5p:4x4xx", 1, "does not exist"),
        ("v6e:4x4x4", 1, "v6e:1x1, v6e:2x2, .*v6e:16x16$"),
        ("v6e:4x4", 0, "slices 0 must be at least 1"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(name, slices, message):
    with pytest.raises(ValueError, match=message):
        chips.parse(name, slices=slices)


def test_published_figures_divide_as_the_tables_say():
    v7 = chips.GENERATIONS["tpu7x"]
    assert v7.flops * v7.devices_per_chip == 2307e12
    for generation, total in (("v5e", 400e9), ("v5p", 1200e9), ("v6e", 800e9), ("tpu7x", 1200e9)):
        found = chips.GENERATIONS[generation]
        assert found.link_bandwidth * 2 * 2 * found.torus_dims == total
