"""What a compiled program holds, against programs whose content is known."""

import jax
import jax.numpy as jnp
import pytest

from mtp_jax.planning.hlo import Traffic, read_hlo

# As a TPU program has it, cut down: a loop of three turns that starts at 1 and does not
# say so, a reduce-scatter as a fusion, a collective in two fusions of one chain, an
# asynchronous one, and a branch.
TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%all-reduce-scatter.1 (input: f32[64,4]) -> f32[16,4] {
  %input = f32[64,4]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.1 = f32[64,4]{1,0:T(8,128)} all-reduce(%input), channel_id=1, \
replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice.1 = f32[16,4]{1,0} dynamic-slice(%all-reduce.1), sizes={16,4}
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%begun (p: bf16[8]) -> (bf16[8], bf16[32]) {
  %p = bf16[8]{0:T(1024)(128)(2,1)} parameter(0)
  %all-gather.1 = bf16[32]{0} all-gather(%p), replica_groups=mesh['a'=2,'b'=2] \
{'a','b'}, dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %t = (bf16[8]{0}, bf16[32]{0}) tuple(%p, %all-gather.1)
}

%done (p.1: bf16[8]) -> bf16[32] {
  %p.1 = bf16[8]{0} parameter(0)
  ROOT %all-gather.2 = bf16[32]{0} all-gather(%p.1), replica_groups=mesh['a'=2,'b'=2] \
{'a','b'}, dimensions={0}, frontend_attributes={chain_id="7"}
}

%body (b: (s32[], f32[64,4])) -> (s32[], f32[64,4]) {
  %b = (s32[]{:T(128)}, f32[64,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %w = f32[64,4]{1,0} get-tuple-element(%b), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %scattered = f32[16,4]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %r = (s32[]{:T(128)}, f32[64,4]{1,0}) tuple(%next, %w)
}

%condition (c: (s32[], f32[64,4])) -> pred[] {
  %end = s32[]{:T(128)} constant(4)
  %c = (s32[]{:T(128)}, f32[64,4]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %end), direction=LT
}

%permuting (q: f32[6]) -> f32[6] {
  %q = f32[6]{0} parameter(0)
  ROOT %permute = f32[6]{0} collective-permute(%q), source_target_pairs={{0,1},{1,0}}
}

%plain (q.1: f32[6]) -> f32[6] {
  ROOT %q.1 = f32[6]{0} parameter(0)
}

ENTRY %main (w.1: f32[64,4], v: bf16[8], u: f32[6]) -> f32[6] {
  %w.1 = f32[64,4]{1,0} parameter(0), metadata={op_name="state.params"}
  %v = bf16[8]{0} parameter(1)
  %u = f32[6]{0} parameter(2)
  %begin = s32[]{:T(128)} constant(1)
  %begin.1 = s32[]{:T(128)} copy(%begin)
  %init = (s32[]{:T(128)}, f32[64,4]{1,0}) tuple(%begin.1, %w.1)
  %loop = (s32[]{:T(128)}, f32[64,4]{1,0}) while(%init), condition=%condition, \
body=%body
  %f = (bf16[8]{0}, bf16[32]{0}) fusion(%v), kind=kOutput, calls=%begun
  %g = bf16[32]{0} fusion(%v), kind=kOutput, calls=%done
  %start = (f32[6]{0}, f32[6]{0}) all-reduce-start(%u), replica_groups=[2,2]<=[4], \
to_apply=%add
  %end.1 = f32[6]{0} all-reduce-done(%start)
  %which = pred[] constant(true)
  %after = token[] after-all()
  %out = (f32[6]{0:T(1024)}, u32[], token[]) send(%end.1, %after), channel_id=9, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1:3}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%out), channel_id=9, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1:3}x{0:3}"}
  ROOT %either = f32[6]{0} conditional(%which, %u, %u), \
true_computation=%permuting, false_computation=%plain
}
"""


def test_forms_of_tpu_programs():
    program = read_hlo(TPU)

    assert program.collectives == {
        "reduce-scatter": Traffic(3, 3 * 1024 * 3 / 4),
        "all-gather": Traffic(1, 16 * 3),
        "all-reduce": Traffic(1, 2 * 24 * 1 / 2),
        "collective-permute": Traffic(1, 24),
        "dcn": Traffic(1, 2 * 24 * 2 / 3),  # between three slices
    }
    assert program.dcn_bytes == 32
    others = [x.bytes for kind, x in program.collectives.items() if kind != "dcn"]
    assert program.sent_bytes == sum(others)
    assert program.unknown_loops == ()
    assert program.instructions == TPU.count(" = ")
    largest = program.buffers[0]
    assert (largest.shape, largest.dtype, largest.bytes) == ((64, 4), "f32", 1024)
    assert largest.name == "state.params"


def test_a_loop_that_does_not_tell_its_turns_is_named():
    endless = TPU.replace("direction=LT", "direction=NE")

    program = read_hlo(endless)

    assert program.unknown_loops == ("loop",)
    assert program.collectives["reduce-scatter"].count == 1


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_hlo("module @jit_step {}")


def compiled_text(local, *shape):
    """The program of `local` on each of eight devices, of an array split among them."""
    mesh = jax.make_mesh((8,), ("x",))
    spec = jax.P("x", *(None,) * (len(shape) - 1))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)
        return jax.jit(mapped).lower(x).compile().as_text()


def test_a_scan_of_five_sums():
    def local(x):
        def body(c, _):
            return jnp.sin(jax.lax.psum(c, "x")), None

        return jax.lax.scan(body, x, length=5)[0]

    program = read_hlo(compiled_text(local, 8 * 100))

    assert program.collectives == {"all-reduce": Traffic(5, 5 * 2 * 400 * 7 / 8)}
    assert program.sent_bytes == 5 * 2 * 400 * 7 / 8


def test_nested_scans_multiply():
    def local(x):
        def inner(c, _):
            gathered = jax.lax.all_gather(c, "x", tiled=True)
            return c + jnp.sum(jnp.sin(gathered)), None

        def outer(c, _):
            c = jax.lax.scan(inner, c, length=3)[0]
            return jnp.cos(jax.lax.psum(c, "x")), None

        return jax.lax.scan(outer, x, length=4)[0]

    program = read_hlo(compiled_text(local, 8 * 16, 10))

    assert program.collectives == {
        "all-gather": Traffic(12, 12 * 640 * 7),
        "all-reduce": Traffic(4, 4 * 2 * 640 * 7 / 8),
    }
    assert program.buffers[0].shape == (128, 10)
    assert program.buffers[0].elements == 1280
    assert program.buffers[0].bytes == 5120


def test_the_other_kinds():
    def local(x):
        x = jax.lax.psum_scatter(jnp.sin(x), "x", tiled=True)
        x = jax.lax.ppermute(jnp.sin(x), "x", [(i, (i + 1) % 8) for i in range(8)])
        return jax.lax.all_to_all(jnp.sin(x), "x", 0, 0, tiled=True)

    program = read_hlo(compiled_text(local, 8 * 64, 16))

    assert program.collectives == {
        "reduce-scatter": Traffic(1, 64 * 16 * 4 * 7 / 8),
        "collective-permute": Traffic(1, 8 * 16 * 4),
        "all-to-all": Traffic(1, 8 * 16 * 4 * 7 / 8),
    }
