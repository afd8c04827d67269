"""Reading and counting the text of compiled programs: lines written by hand."""

from __future__ import annotations

import pytest

from l4jax.planning import counting, hlo

MESH = {"fsdp": 4, "expert": 2}


def counted(body: str, computations: str = "", **options) -> counting.Counts:
    """Counts an entry computation with these lines."""
    text = (
        f"HloModule m, is_scheduled=true\n\n{computations}\nENTRY %main (p: f32[8]) -> f32[8] {{\n"
    )
    return counting.count(text + body.strip("\n") + "\n}\n", MESH, **options)


def wires(counts) -> list:
    return [(c.kind, c.axes, c.times, c.wire) for c in counts.collectives]


# --- Collectives ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "all-gather(%p), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}",
            ("all-gather", ("fsdp",), 3 * 32),
        ),
        (
            "all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add",
            ("all-reduce", ("expert",), 32),
        ),
        (
            "all-reduce(%p), replica_groups={}, to_apply=%add",
            ("all-reduce", ("fsdp", "expert"), 2 * 7 / 8 * 32),
        ),
        (
            "reduce-scatter(%p), replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}",
            ("reduce-scatter", ("fsdp",), 3 / 4 * 32),
        ),
        (
            "all-to-all(%p, %p), replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}",
            ("all-to-all", ("fsdp",), 3 / 4 * 64),
        ),
        (
            "all-reduce(%p), replica_groups=mesh['x'=8] {'x':(2)2}, to_apply=%add",
            ("all-reduce", ("fsdp",), 32),
        ),
        (
            "all-reduce(%p), replica_groups=mesh['x'=8], device_ids=(1,0,3,2,5,4,7,6) {'x':(4)2}",
            ("all-reduce", ("expert",), 32),
        ),
        (
            "collective-permute(%p), source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,1}}",
            ("collective-permute", ("fsdp",), 32),
        ),
    ],
)
def test_a_collective_is_counted_by_the_ring_model(line, expected):
    found = counted(f"  %p = f32[8]{{0}} parameter(0)\n  ROOT %x = f32[8]{{0}} {line}")
    kind, axes, wire = expected
    assert wires(found) == [(kind, axes, 1.0, wire)]
    assert found.wire() == found.wire_by_kind()[kind] == found.wire_by_axes()["+".join(axes)]


def test_messages_to_oneself_are_none():
    found = counted("""
  %p = f32[8]{0} parameter(0)
  ROOT %x = f32[8]{0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}
""")
    assert found.wire() == 0


def test_ragged_buffers_count_as_the_smaller_one():
    found = counted("""
  %p = bf16[64,8]{1,0} parameter(0)
  %buffer = bf16[512,8]{1,0} parameter(1)
  %n = s32[2]{0} parameter(2)
  ROOT %x = bf16[512,8]{1,0} ragged-all-to-all(%p, %buffer, %n, %n, %n, /*index=5*/%n), \
replica_groups={{0,1},{2,3},{4,5},{6,7}}
""")
    assert wires(found) == [("ragged-all-to-all", ("expert",), 1.0, 64 * 8 * 2 / 2)]


def test_asynchronous_pairs_count_once():
    found = counted(
        """
  %p = bf16[16,4]{1,0} parameter(0)
  %s = (bf16[16,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%p), replica_groups={{0,1}}
  %d = bf16[32,4]{1,0} all-gather-done(%s)
  %c = ((bf16[16,4]{1,0}, token[]), bf16[16,4]{1,0}) call-start(%p), to_apply=%called
  ROOT %e = bf16[16,4]{1,0} call-done(%c)
""",
        """
%called (q: bf16[16,4]) -> bf16[16,4] {
  %q = bf16[16,4]{1,0} parameter(0)
  ROOT %r = bf16[16,4]{1,0} all-reduce(%q), replica_groups={{0,2,4,6}}, to_apply=%add
}, execution_thread="sparsecore"
""",
    )
    assert wires(found) == [
        ("all-gather", ("expert",), 1.0, 128),
        ("all-reduce", ("fsdp",), 1.0, 2 * 3 / 4 * 128),
    ]


def test_a_fused_all_reduce_that_keeps_its_part_is_a_reduce_scatter():
    found = counted(
        """
  %p = bf16[64,4]{1,0} parameter(0)
  ROOT %f = bf16[16,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
""",
        """
%all-reduce-scatter.1 (input: bf16[64,4]) -> bf16[16,4] {
  %input = bf16[64,4]{1,0} parameter(0)
  %all = bf16[64,4]{1,0} all-reduce(%input), replica_groups={{0,2,4,6}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = bf16[16,4]{1,0} dynamic-slice(%all, %zero, %zero), dynamic_slice_sizes={16,4}
}
""",
    )
    assert wires(found) == [("reduce-scatter", ("fsdp",), 1.0, 3 / 4 * 512)]


def test_what_goes_between_slices_is_apart():
    found = counted(
        """
  %p = bf16[16,4]{1,0} parameter(0)
  %t = token[] after-all()
  %s = (bf16[16,4]{1,0}, u32[], token[]) send(%p, %t), is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %d = token[] send-done(%s), is_host_transfer=true
""",
        slices=2,
    )
    assert (found.wire("ici"), found.wire("dcn")) == (0, 128)
    assert found.wire_by_kind() == {"dcn-all-reduce": 128}


# --- Loops ---------------------------------------------------------------------------------------
LOOP = """
%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %y = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %y)
}

%condition (s.1: (s32[], f32[8])) -> pred[] {
  %s.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  TEST
}
"""
FUSED_TEST = """%end = s32[] constant(7)
  ROOT %f = pred[] fusion(%i.1, %end), kind=kLoop, calls=%compare"""
COMPARE = """
%compare (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}
"""


def looped(test: str, *, start=0, step=1, attributes="") -> counting.Counts:
    return counted(
        f"""
  %zero = s32[] constant({start})
  %p = f32[8]{{0}} parameter(0)
  %begin = (s32[], f32[8]{{0}}) tuple(%zero, %p)
  %w = (s32[], f32[8]{{0}}) while(%begin), condition=%condition, body=%body{attributes}
  ROOT %out = f32[8]{{0}} get-tuple-element(%w), index=1
""",
        COMPARE + LOOP.replace("STEP", str(step)).replace("TEST", test),
    )


@pytest.mark.parametrize(
    ("test", "options", "times"),
    [
        ("%n = s32[] constant(5)\n  ROOT %c = pred[] compare(%i.1, %n), direction=LT", {}, 5),
        (
            "%n = s32[] constant(5)\n  ROOT %c = pred[] compare(%n, %i.1), direction=GT",
            {"start": 1},
            4,
        ),
        (FUSED_TEST, {"step": 2}, 4),
        (
            "ROOT %c = pred[] fusion(%i.1), kind=kLoop, calls=%unknown",
            {"attributes": ', backend_config={"known_trip_count":{"n":"9"}}'},
            9,
        ),
    ],
)
def test_a_loop_counts_as_often_as_it_runs(test, options, times):
    found = looped(test, **options)
    assert wires(found) == [("all-reduce", ("expert",), times, 32)]
    assert (found.open_loops, found.idle_loops) == ((), 0)


BY_DATA = "%zero = s32[] constant(0)\n  ROOT %c = pred[] compare(%i.1, %zero), direction=GT"


def test_a_loop_that_ends_by_data_counts_once_and_is_named():
    found = looped(BY_DATA, attributes=', metadata={op_name="jit(f)/while"}')
    assert (found.wire(), found.open_loops, found.idle_loops) == (32, ("jit(f)/while",), 0)


def test_of_a_loop_of_known_steps_one_counts_and_its_part_of_the_rest():
    body = """
  %zero = s32[] constant(0)
  %p = f32[8]{0} parameter(0)
  %before = f32[8]{0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}
  %begin = (s32[], f32[8]{0}) tuple(%zero, %before)
  %w = (s32[], f32[8]{0}) while(%begin), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%w), index=1
"""
    found = counted(body, COMPARE + LOOP.replace("STEP", "1").replace("TEST", BY_DATA), steps=4)
    assert found.wire_by_kind() == {"all-reduce": 32, "all-gather": 32 / 4}
    assert found.open_loops == ()


def test_a_loop_for_unbalanced_routing_does_not_run():
    name = f"jit(f)/transpose(jvp({hlo.IDLE}))/while"
    found = looped(BY_DATA, attributes=f', metadata={{op_name="{name}"}}')
    assert (found.wire(), found.open_loops, found.idle_loops) == (0, (), 1)


def test_loops_within_loops_multiply():
    inner = LOOP.replace("STEP", "1").replace(
        "TEST", "%n = s32[] constant(5)\n  ROOT %c = pred[] compare(%i.1, %n), direction=LT"
    )
    outer = """
%outer (o: (s32[], f32[8])) -> (s32[], f32[8]) {
  %o = (s32[], f32[8]{0}) parameter(0)
  %z = s32[] constant(0)
  %j = s32[] get-tuple-element(%o), index=0
  %v = f32[8]{0} get-tuple-element(%o), index=1
  %b = (s32[], f32[8]{0}) tuple(%z, %v)
  %w2 = (s32[], f32[8]{0}) while(%b), condition=%condition, body=%body
  %r = f32[8]{0} get-tuple-element(%w2), index=1
  %g = f32[8]{0} all-gather(%r), replica_groups={{0,2}}
  ROOT %t2 = (s32[], f32[8]{0}) tuple(%j, %g)
}
"""
    found = counted(
        """
  %p = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8]{0}) tuple(%zero, %p)
  ROOT %w = (s32[], f32[8]{0}) while(%begin), condition=%c2, body=%outer, \
backend_config={"known_trip_count":{"n":"3"}}
""",
        inner + outer,
    )
    assert {c.kind: c.times for c in found.collectives} == {"all-gather": 3, "all-reduce": 15}


def test_all_branches_count_unless_they_are_for_unbalanced_routing():
    branches = """
%yes (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%add
}

%no (c: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} parameter(0)
}
"""
    line = "conditional(%q, %p, %p), true_computation=%yes, false_computation=%no"
    body = f"""
  %p = f32[8]{{0}} parameter(0)
  %q = pred[] parameter(1)
  ROOT %r = f32[8]{{0}} {line}"""
    assert counted(body, branches).wire() == 32
    idle = counted(body + f', metadata={{op_name="jit(f)/{hlo.IDLE}/cond"}}', branches)
    assert (idle.wire(), idle.idle_loops) == (0, 1)


# --- Operations ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "flops"),
    [
        (
            "f32[6,10]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            2 * 6 * 7 * 10,
        ),
        ("f32[6,10]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", 2 * 6 * 7 * 10),
    ],
)
def test_products_count_two_for_each_multiplication(line, flops):
    found = counted(f"""
  %a = f32[6,7]{{1,0}} parameter(0)
  %b = f32[7,10]{{1,0}} parameter(1)
  ROOT %c = {line}
""")
    assert found.product_flops == found.flops == flops


def test_a_batched_product_written_as_a_convolution_counts_no_padding():
    # 3 heads as a dimension of the window, reversed: each output sees one position of the kernel.
    found = counted("""
  %a = bf16[3,5,8]{2,1,0} parameter(0)
  %b = bf16[3,8,4]{2,1,0} parameter(1)
  ROOT %c = bf16[3,5,4]{2,1,0} convolution(%a, %b), \
window={size=3 stride=2 pad=2_2 lhs_dilate=3}, dim_labels=0bf_0io->0bf
""")
    assert found.product_flops == 2 * 3 * 5 * 8 * 4


KERNEL = """
  %counts = s32[3]{0} parameter(0)
  %a = bf16[96,16]{1,0} parameter(1)
  %b = bf16[3,16,20]{2,1,0} parameter(2)
  ROOT %NAME = bf16[96,20]{1,0} custom-call(%counts, %a, %b), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x"ESTIMATE}}
"""


def kernel(name, estimate="", **options):
    return counted(KERNEL.replace("NAME", name).replace("ESTIMATE", estimate), **options)


def test_a_kernel_counts_what_it_says():
    found = kernel("mine.2.lhs", ',"cost_estimate":{"flops":"123","bytes_accessed":"9"}')
    assert [(k.name, k.flops) for k in found.kernels] == [("mine", 123)]
    assert (found.kernel_flops, found.uncounted_kernels) == (123, ())
    assert found.hbm_bytes == 9


@pytest.mark.parametrize(("told", "left"), [(4000, 4000 - 3072), (2000, 0)])
def test_a_kernel_reads_from_hbm_what_is_not_on_the_chip_yet(told, left):
    estimate = f',"cost_estimate":{{"flops":"123","bytes_accessed":"{told}"}}'
    text = KERNEL.replace("NAME", "mine").replace("ESTIMATE", estimate)
    assert counted(text.replace("bf16[96,16]{1,0}", "bf16[96,16]{1,0:S(1)}")).hbm_bytes == left


def test_a_kernel_that_says_nothing_is_named():
    found = kernel("mine.2")
    assert (found.kernel_flops, found.uncounted_kernels) == (0, ("mine",))


@pytest.mark.parametrize("estimate", ["", ',"cost_estimate":{"flops":"61440"}'])
def test_a_grouped_product_counts_the_rows_that_balanced_routing_fills(estimate):
    assert kernel("gmm.1", estimate).kernel_flops == 2 * 96 * 16 * 20
    assert kernel("ragged-dot-none.1", estimate, grouped_rows=72).flops == 2 * 72 * 16 * 20
    assert kernel("transpose_jvp_jit_gmm___.3", estimate, grouped_rows=72).flops == (
        2 * 72 * 16 * 20
    )
    assert kernel("gmm.1", estimate, grouped_rows=500).flops == 2 * 96 * 16 * 20


def test_the_weight_gradient_of_a_grouped_product():
    found = counted(
        """
  %counts = s32[3]{0} parameter(0)
  %a = bf16[16,96]{1,0} parameter(1)
  %b = bf16[96,20]{1,0} parameter(2)
  ROOT %tgmm.1 = f32[3,16,20]{2,1,0} custom-call(%counts, %a, %b), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x"}}
""",
        grouped_rows=48,
    )
    assert found.flops == 2 * 48 * 16 * 20


def test_splash_attention_counts_its_causal_blocks():
    found = counted("""
  %next = s8[1,4,4]{2,1,0} parameter(0)
  %q = bf16[2,8,512,64]{3,2,1,0} parameter(1)
  %k = bf16[2,512,64]{2,1,0} parameter(2)
  ROOT %splash_mha_fwd_residuals.3 = bf16[2,8,512,64]{3,2,1,0} custom-call(%next, %next, %q, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128, \\"block_kv\\": 128}"
}}, backend_config={"custom_call_config":{"body":"x"}}
""")
    blocks = 4 * 5 / 2
    assert found.kernel_flops == 2 * 2 * blocks * 128 * 128 * 64 * 16


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(
    ("name", "block", "size", "products"),
    [
        ("fwd_residuals", "block_kv", 256, 2),
        ("dq", "block_kv_dq", 256, 3),
        ("dkv", "block_q_dkv", 128, 4),
    ],
)
def test_splash_attention_of_a_part_of_the_queries_sees_its_share_of_the_keys(
    name, block, size, products, in_order
):
    """512 of 2,048 queries: two pieces from either end, or, of the busiest shard, the last ones."""
    text = f"""
  %next = s8[1,4,8]{{2,1,0}} parameter(0)
  %q = bf16[2,8,512,64]{{3,2,1,0}} parameter(1)
  %k = bf16[2,2048,64]{{2,1,0}} parameter(2)
  ROOT %splash_mha_{name}.3 = bf16[2,8,512,64]{{3,2,1,0}} custom-call(%next, %next, %q, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"{block}\\": {size}}}"
}}}}, backend_config={{"custom_call_config":{{"body":"x"}}}}
"""
    seen = 512 * 2048 * (1 - 512 / 2048 / 2) if in_order else 512 * 2048 / 2
    found = counted(text, in_order=in_order)
    expected = 2 * products * seen * 64 * 16
    # What blocks on the diagonal waste, in those of this size.
    assert found.kernel_flops == pytest.approx(expected, rel=1e-9 if in_order else 0.26)
    assert found.kernel_flops >= expected


# --- Memory traffic ------------------------------------------------------------------------------
def test_slices_and_updates_of_large_arrays_count_as_large_as_they_are():
    found = counted(
        """
  %stack = f32[9,100]{1,0} parameter(0)
  %row = f32[1,100]{1,0} parameter(1)
  %i = s32[] constant(2)
  %one = f32[1,100]{1,0} fusion(%stack, %i), kind=kLoop, calls=%take
  ROOT %all = f32[9,100]{1,0} fusion(%stack, %row, %i), kind=kLoop, calls=%put
""",
        """
%take (a: f32[9,100], i: s32[]) -> f32[1,100] {
  %a = f32[9,100]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %s = f32[1,100]{1,0} dynamic-slice(%a, %i.1, %i.1), dynamic_slice_sizes={1,100}
  ROOT %n = f32[1,100]{1,0} negate(%s)
}

%put (b: f32[9,100], c: f32[1,100], j: s32[]) -> f32[9,100] {
  %b = f32[9,100]{1,0} parameter(0)
  %c = f32[1,100]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %u = f32[9,100]{1,0} dynamic-update-slice(%b, %c, %j, %j)
}
""",
    )
    scalars = 2 * 4
    assert found.hbm_bytes == 4 * 400 + scalars


def test_a_slice_of_another_view_counts_as_a_slice():
    found = counted(
        """
  %stack = bf16[9,100]{1,0} parameter(0)
  %i = s32[] constant(2)
  ROOT %one = f32[1,100]{1,0:T(128)S(1)} fusion(%stack, %i), kind=kOutput, calls=%outer
""",
        """
%view (v: bf16[9,100]) -> bf16[9,100] {
  %v = bf16[9,100]{1,0} parameter(0)
  ROOT %w = bf16[9,100]{1,0:T(8,128)} copy(%v)
}

%outer (a: bf16[9,100], i: s32[]) -> f32[1,100] {
  %a = bf16[9,100]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %b = bf16[9,100]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%view
  %c = f32[9,100]{1,0:T(8,128)} convert(%b)
  ROOT %s = f32[1,100]{1,0} dynamic-slice(%c, %i.1, %i.1), dynamic_slice_sizes={1,100}
}
""",
    )
    assert found.hbm_bytes == 200 + 4


def test_what_lies_on_the_chip_or_on_the_host_is_not_hbm():
    found = counted("""
  %p = f32[100]{0:T(128)} parameter(0)
  %start = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%p)
  %near = f32[100]{0:T(128)S(1)} copy-done(%start)
  %n = f32[100]{0:T(128)S(1)} negate(%near)
  %far.1 = (f32[100]{0:T(128)S(5)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%p)
  %far = f32[100]{0:T(128)S(5)} copy-done(%far.1)
  %back.1 = (f32[100]{0:T(128)}, f32[100]{0:T(128)S(5)}, u32[]{:S(2)}) copy-start(%far)
  ROOT %back = f32[100]{0:T(128)} copy-done(%back.1)
""")
    assert found.hbm_bytes == 400 + 400 + 400
    assert (found.to_host_bytes, found.from_host_bytes) == (400, 400)


def test_types_are_measured_to_the_bit():
    sizes = [
        s.bytes
        for s in hlo.shapes("(bf16[3,5]{1,0}, s4[6]{0}, pred[7]{0}, f8e4m3fn[2]{0}, token[])")
    ]
    assert sizes == [30, 3, 7, 2]


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.Module("module @jit_f {\n}\n")
