"""What collectives carry, of a module written by hand."""

import jax
import jax.numpy as jnp

from experiments.plan import provenance

TRAVELS = """%sum (p: f32[64]) -> f32[8] {
  %g = f32[64]{0} parameter(0)
  %all = f32[64]{0} all-reduce(%g), to_apply=%add
  ROOT %part = f32[8]{0} slice(%all)
}
%begin (p: f32[8,64]) -> (f32[8,64], f32[64,64]) {
  %b = f32[8,64]{1,0} parameter(0)
  %early = f32[64,64]{1,0} all-gather(%b), channel_id=3, dimensions={0}
  ROOT %both = (f32[8,64]{1,0}, f32[64,64]{1,0}) tuple(%b, %early)
}
%end (p: f32[8,64], q: f32[64,64]) -> f32[64,64] {
  %e = f32[8,64]{1,0} parameter(0)
  %q = f32[64,64]{1,0} parameter(1)
  ROOT %finished = f32[64,64]{1,0} all-gather(%e), channel_id=3, dimensions={0}
}
%turn (p: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %carried = (s32[], f32[8,64]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%carried), index=0
  %piece = f32[8,64]{1,0} get-tuple-element(%carried), index=1
  %next = f32[8,64]{1,0} collective-permute(%piece), metadata={op_name="ring"}
  ROOT %pair = (s32[], f32[8,64]{1,0}) tuple(%count, %next)
}
%wrapped (p: f32[64]) -> f32[64] {
  %inner = f32[64]{0} parameter(0)
  ROOT %late = f32[64]{0} all-reduce(%inner), to_apply=%add
}
ENTRY %main (x: f32[8,64], w: f32[8,64], v: f32[8,64]) -> f32[8] {
  %x = f32[8,64]{1,0} parameter(0), metadata={op_name="batch['image']"}
  %w = f32[8,64]{1,0} parameter(1), metadata={op_name="state.params['net']['w']"}
  %v = f32[8,64]{1,0} parameter(2), metadata={op_name="state.params['net']['v']"}
  %m = f32[64]{0} parameter(3), metadata={op_name="state.opt_state['net']['w']"}
  %start = (f32[8,64]{1,0}, f32[64,64]{1,0}) fusion(%w), kind=kCustom, calls=%begin
  %w0 = f32[8,64]{1,0} get-tuple-element(%start), index=0
  %w1 = f32[64,64]{1,0} get-tuple-element(%start), index=1
  %whole = f32[64,64]{1,0} fusion(%w0, %w1), kind=kCustom, calls=%end
  %first = (s32[], f32[8,64]{1,0}) tuple(%zero, %v)
  %ring = (s32[], f32[8,64]{1,0}) while(%first), condition=%c, body=%turn, backend_config={"known_trip_count":{"n":"7"}}
  %second = f32[8,64]{1,0} get-tuple-element(%ring), index=1
  %y = f32[8,64]{1,0} dot(%x, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/jvp(net)/dot"}
  %sent = (f32[8,64]{1,0}, f32[64,64]{1,0}) all-gather-start(%y), dimensions={0}
  %spread = f32[64,64]{1,0} all-gather-done(%sent)
  %z = f32[64,64]{1,0} dot(%spread, %second), lhs_contracting_dims={1}, rhs_contracting_dims={1}, metadata={op_name="jit(step)/jvp(net)/dot"}
  %line = f32[64]{0} reduce(%z, %zero), to_apply=%add
  %dw = f32[8]{0} fusion(%line), kind=kCustom, calls=%sum
  %begun = ((f32[64]{0}), f32[64]{0}) async-start(%line), calls=%wrapped
  %dv = f32[64]{0} async-done(%begun)
  %muon = f32[64]{0} dot(%dv, %m), lhs_contracting_dims={0}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/muon/dot"}
  %loss = (f32[], f32[16]{0}) all-reduce(%l, %line), to_apply=%add
  ROOT %out = (f32[8]{0}, f32[64]{0}) tuple(%dw, %muon)
}
"""  # noqa: E501


def test_what_a_collective_carries_is_read_from_where_it_comes_and_goes():
    flow = provenance.Flow(TRAVELS)
    told = [(t.kind, t.carries, t.times, t.result_bytes, t.leaves) for t in flow.travels()]
    assert told == [
        ("all-gather", "weights", 1, 4 * 64 * 64, ("net/w",)),
        ("collective-permute", "weights", 7, 4 * 8 * 64, ("net/v",)),
        ("all-gather", "activations", 1, 4 * 64 * 64, ()),
        ("all-reduce", "gradients", 1, 4 * 64, ()),
        ("all-reduce", "gradients", 1, 4 * 64, ()),
        ("all-reduce", "other", 1, 4 * 17, ()),
    ]
    totals = provenance.totals(flow.travels())
    assert totals["weights"] == {"count": 8, "bytes": 4 * 64 * 64 + 7 * 4 * 8 * 64}
    assert totals["gradients"]["count"] == 2 and totals["other"]["count"] == 1
    # w once, of v seven of eight parts
    shapes = {name: jax.ShapeDtypeStruct((64, 64), jnp.float32) for name in "wv"}
    assert provenance.gathers(flow.travels(), {"net": shapes}) == 1
