"""Which collectives of a program are hidden behind work, against programs by hand."""

import pytest

from mtp_jax.planning.hlo import Traffic, read_hlo

HEADER = "HloModule m, is_scheduled=true, num_partitions=4\n"
HELPERS = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%multiply (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%a, %a)
}

%scattering (s: f32[8]) -> f32[2] {
  %s = f32[8]{0} parameter(0)
  ROOT %scatter = f32[2]{0} reduce-scatter(%s), replica_groups={{0,1,2,3}}, \
dimensions={0}, to_apply=%add
}

%all-reduce-scatter.1 (r: f32[8]) -> f32[2] {
  %r = f32[8]{0} parameter(0)
  %reduced = f32[8]{0} all-reduce(%r), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[2]{0} dynamic-slice(%reduced), sizes={2}
}
"""
PARAMETER = "  %v = f32[8]{0} parameter(0)\n"
WORK = "  %w = f32[8]{0} fusion(%v), kind=kLoop, calls=%multiply\n"
VIEW = "  %w = f32[8]{0} bitcast(%v)\n"
GROUPS = "replica_groups={{0,1,2,3}}"
START = f"  %s1 = (f32[8], f32[32]) all-gather-start(%v), {GROUPS}, dimensions={{0}}\n"
DONE = "  ROOT %d1 = f32[32]{0} all-gather-done(%s1)\n"
ASYNC = "  %s2 = ((f32[8]), f32[2], u32[]) async-start(%v), calls=%scattering\n"
ASYNC_DONE = "  ROOT %d2 = f32[2]{0} async-done(%s2), calls=%scattering\n"


def program(*lines):
    """What is read of a program of these lines."""
    entry = "\nENTRY %main (v: f32[8]) -> f32[8] {\n" + PARAMETER + "".join(lines)
    return read_hlo(HEADER + HELPERS + entry + "}\n").collectives


@pytest.mark.parametrize(("between", "hidden"), [(WORK, 1), (VIEW, 0), ("", 0)])
def test_what_starts_and_ends_is_hidden_by_work_between(between, hidden):
    found = program(START, between, DONE)

    assert found == {"all-gather": Traffic(1, 96, hidden, 96.0 * hidden)}
    scattered = program(ASYNC, between, ASYNC_DONE)
    assert scattered == {"reduce-scatter": Traffic(1, 24, hidden, 24.0 * hidden)}


def test_work_before_the_start_or_after_the_end_hides_nothing():
    found = program(WORK, START, DONE.replace("ROOT ", ""), WORK.replace("%w", "%u"))

    assert found == {"all-gather": Traffic(1, 96)}


def test_a_collective_behind_another_is_exposed():
    scatter = "  %f = f32[2]{0} fusion(%v), kind=kCustom, calls=%all-reduce-scatter.1\n"

    assert program(START, scatter, DONE) == {
        "all-gather": Traffic(1, 96),
        "reduce-scatter": Traffic(1, 24),
    }
    assert program(scatter, WORK) == {"reduce-scatter": Traffic(1, 24)}


CHAIN = """
%step.1 (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %g1 = f32[32]{0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, \
frontend_attributes={chain_id="3"}
}

%step.2 (q: f32[8], k: f32[8,8]) -> (f32[8], f32[32]) {
  %q = f32[8]{0} parameter(0)
  %k = f32[8,8]{1,0} parameter(1)
  %product = f32[8]{0} convolution(%q, %k), dim_labels=f_io->f
  %g2 = f32[32]{0} all-gather(%q), replica_groups={{0,1,2,3}}, dimensions={0}, \
frontend_attributes={chain_id="3"}
  ROOT %both = (f32[8]{0}, f32[32]{0}) tuple(%product, %g2)
}

%step.3 (l: f32[8]) -> f32[32] {
  %l = f32[8]{0} parameter(0)
  ROOT %g3 = f32[32]{0} all-gather(%l), replica_groups={{0,1,2,3}}, dimensions={0}, \
frontend_attributes={chain_id="3"}
}

ENTRY %main (v: f32[8], m: f32[8,8]) -> f32[32] {
  %v = f32[8]{0} parameter(0)
  %m = f32[8,8]{1,0} parameter(1)
  %f1 = f32[32]{0} fusion(%v), kind=kCustom, calls=%step.1
  %f2 = (f32[8]{0}, f32[32]{0}) fusion(%v, %m), kind=kOutput, calls=%step.2
  ROOT %f3 = f32[32]{0} fusion(%v), kind=kCustom, calls=%step.3
}
"""


def test_a_chain_of_fusions_is_hidden_by_their_arithmetic():
    found = read_hlo(HEADER + HELPERS + CHAIN).collectives

    assert found == {"all-gather": Traffic(1, 96, 1, 96.0)}
    idle = CHAIN.replace("convolution(%q, %k), dim_labels=f_io->f", "copy(%q)")
    assert read_hlo(HEADER + HELPERS + idle).collectives == {
        "all-gather": Traffic(1, 96)
    }


def test_turns_of_a_loop_count_each():
    loop = f"""
%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %b = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %v = f32[8]{{0}} get-tuple-element(%b), index=1
{START}{WORK}  %d1 = f32[32]{{0}} all-gather-done(%s1)
  ROOT %t = (s32[], f32[8]{{0}}) tuple(%i, %w)
}}

%condition (c: (s32[], f32[8])) -> pred[] {{
  %c = (s32[], f32[8]{{0}}) parameter(0)
  ROOT %yes = pred[] constant(true)
}}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %a0 = (s32[], f32[8]{{0}}) parameter(0)
  ROOT %l = (s32[], f32[8]{{0}}) while(%a0), condition=%condition, body=%body, \
backend_config={{"known_trip_count":{{"n":"5"}}}}
}}
"""
    found = read_hlo(HEADER + HELPERS + loop).collectives

    assert found == {"all-gather": Traffic(5, 5 * 96, 5, 5 * 96.0)}
