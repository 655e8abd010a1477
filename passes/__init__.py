"""The pipeline, read top to bottom. Every pass is a plain function ``Program -> Program`` in a file of its own."""

from __future__ import annotations

from tpcompile.passes.axes import axes
from tpcompile.passes.backward_all_reduces import backward_all_reduces
from tpcompile.passes.canonicalize import canonicalize
from tpcompile.passes.constants import constants
from tpcompile.passes.cross_entropy import cross_entropy
from tpcompile.passes.decompose import decompose
from tpcompile.passes.emit import emit
from tpcompile.passes.forward_all_reduces import forward_all_reduces
from tpcompile.passes.functionalize import functionalize
from tpcompile.passes.in_place import in_place
from tpcompile.passes.independent_dropout import independent_dropout
from tpcompile.passes.overlap import overlap
from tpcompile.passes.parameter_copies import parameter_copies
from tpcompile.passes.place import place
from tpcompile.passes.recompute import recompute
from tpcompile.passes.sequence_parallel import sequence_parallel
from tpcompile.passes.structure import structure
from tpcompile.passes.tidy import tidy
from tpcompile.passes.wide_reductions import wide_reductions
from tpcompile.program import Pass

PIPELINE: tuple[Pass, ...] = (
    functionalize,  # no op writes into another value
    canonicalize,  # fewer kinds of ops
    structure,  # which dims are one index space
    axes,  # which index spaces the spec cuts
    decompose,  # norms, softmax and losses along a cut axis, as statistics
    place,  # a state per value and mesh axis
    forward_all_reduces,  # partial sums that meet are reduced once
    sequence_parallel,  # if asked: between the cut blocks positions are spread over the ranks
    backward_all_reduces,  # a minimum cut decides where f stands
    constants,  # what would be made whole and then cut is made cut
    emit,  # one rank's code
    independent_dropout,  # if asked: masks of each rank's own
    tidy,  # local identities: biases fused back, no-ops gone
    parameter_copies,  # gradients of whole parameters in cut regions: one bucket, or one per layer
    wide_reductions,  # if asked: sums over ranks in float32
    overlap,  # if asked: products in pieces, whose sums travel meanwhile
    in_place,  # all-reduces that may overwrite what they sum
    cross_entropy,  # the statistics of cut logits as one node, which keeps one tensor of their size
    recompute,  # if asked: what is run again in backward instead of being kept
)

__all__ = ["PIPELINE"]
