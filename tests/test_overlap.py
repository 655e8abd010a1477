"""Overlap: products in pieces, sums started and waited for; equal to without, in one process and on real ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from distributed import run
from torch import nn

import tpcompile
from tpcompile import collectives, kernels
from tpcompile.compare import backward, gradient_errors, relative_error
from tpcompile.compiler import rewrite
from tpcompile.equivalence import verify
from tpcompile.errors import ShardingError
from tpcompile.program import Options, Program
from tpcompile.spec import Spec

ALLOWED = 1e-12


def named(program: Program, function: object) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.target is function]


@pytest.mark.parametrize("options", [{}, {"sequence_parallel": True}], ids=["plain", "spread"])
@pytest.mark.parametrize(("degree", "pieces"), [(2, 2), pytest.param(4, 3, marks=pytest.mark.slow)])
def test_equal_to_one_device(options: Any, degree: int, pieces: int) -> None:
    case = zoo.case("llama")
    report = verify(case.model, case.spec, degree=degree, example_inputs=case.inputs, overlap=pieces, **options)
    assert report.ok
    assert max(report.output_error, report.gradient_error) < ALLOWED


def test_a_piece_that_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.split_evenly

    def broken(x: torch.Tensor, dim: int, count: int) -> tuple[torch.Tensor, ...]:
        first, *others = real(x, dim, count)
        return first * 1.01, *others

    broken.__name__ = "split_evenly"
    monkeypatch.setattr(kernels, "split_evenly", broken)
    assert not verify(Pair(), PAIR, degree=2, example_inputs=(torch.randn(4, 8),), overlap=2).ok


def test_every_sum_behind_a_product_is_split_and_waited_for() -> None:
    plain, split = zoo.program("llama", 2), zoo.program("llama", 2, options=Options(overlap=2))
    assert len(named(plain, collectives.all_reduce)) == 5
    # two layers of two products; the embedding's lookup is none
    assert len(named(split, collectives.all_reduce)) == 4 * 2 + 1
    begun = [n for n in named(split, collectives.all_reduce) if n.kwargs.get("pending")]
    assert len(begun) == len(named(split, collectives.wait)) == 8
    for node in begun:
        assert [user.target for user in node.users] == [collectives.wait]
    listed = [sum(row.bytes * row.count for row in p.collectives) for p in (plain, split)]
    assert listed[0] == listed[1]


def test_all_pieces_are_begun_before_one_is_waited_for() -> None:
    graph = list(zoo.program("llama", 2, options=Options(overlap=3)).graph.nodes)
    places = {node: i for i, node in enumerate(graph)}
    for whole in (
        n for n in graph if n.target is torch.ops.aten.cat.default and n.args[0][0].target is collectives.wait
    ):
        waits = list(whole.all_input_nodes)
        assert max(places[w.all_input_nodes[0]] for w in waits) < min(map(places.__getitem__, waits))


def test_nothing_is_split_unasked() -> None:
    assert not named(zoo.program("llama", 2), kernels.split_evenly)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


PAIR = Spec.parse("up column\ndown row\n")


def test_wide_sums_are_split_too() -> None:
    options: Any = {"overlap": 2, "reduce_dtype": torch.float32}
    model, inputs = Pair().bfloat16(), (torch.randn(4, 8).bfloat16(),)
    program = rewrite(model, PAIR, degree=2, example_inputs=inputs, **options)
    assert len(named(program, collectives.wait)) == 2
    assert [n.meta["val"].dtype for n in named(program, collectives.all_reduce)] == [torch.float32] * 2
    assert verify(model, PAIR, degree=2, example_inputs=inputs, **options).ok


def test_what_cannot_be_split_is_refused_with_its_place() -> None:
    with pytest.raises(ShardingError, match="cannot be overlapped") as caught:
        rewrite(Pair(), PAIR, degree=2, example_inputs=(torch.randn(3, 8),), overlap=4)
    where = caught.value.where
    assert where is not None
    assert where.module == "down"
    rewrite(Pair(), PAIR, degree=2, example_inputs=(torch.randn(4, 8),), overlap=4)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_what_is_no_number_of_pieces(wrong: Any) -> None:
    with pytest.raises(ShardingError, match="overlap is"):
        Options(overlap=wrong)


def test_not_with_layers_that_run_again() -> None:
    with pytest.raises(ShardingError, match="together"):
        replace(Options(overlap=2), recompute="layers")


def test_a_program_without_such_a_sum_warns() -> None:
    with pytest.warns(UserWarning, match="overlap has no effect"):
        rewrite(Pair(), Spec.parse("up replicate\n"), degree=2, example_inputs=(torch.randn(4, 8),), overlap=2)


def test_pieces_of_any_size() -> None:
    x = torch.arange(14.0, requires_grad=True).view(7, 2)
    for count in (1, 2, 3, 7, 9):
        pieces = kernels.split_evenly(x, 0, count)
        assert len(pieces) == count
        assert torch.equal(torch.cat(pieces), x)


# ------------------------------------------------------------------------------------------------- real ranks
def waiting() -> int:
    """How many collectives have been started and not waited for."""
    from torch._C import _distributed_c10d  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]

    return int(_distributed_c10d._get_work_registry_size())  # pyright: ignore[reportPrivateUsage]


def rank_errors(name: str, options: dict[str, Any], traced: bool) -> tuple[float, float, int]:
    """Worst errors of outputs and gradients with overlap against without, in float64; and messages left waiting."""
    torch.set_num_threads(1)
    model, inputs = zoo.build(name).double(), zoo.inputs(name)
    found: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    for pieces in (1, 2):
        tp = tpcompile.compile(model, example_inputs=inputs, overlap=pieces, **options)
        call: Any = torch.compile(tp, backend="aot_eager", fullgraph=True) if traced and pieces == 2 else tp
        output = call(**inputs).logits
        backward(output)
        found.append((output.detach(), {n: p.grad for n, p in tp.named_parameters() if p.grad is not None}))
    (output, gradients), (other, others) = found
    return relative_error(output, other), max(gradient_errors(gradients, others).values()), waiting()


SPREAD = pytest.param({"sequence_parallel": True}, marks=pytest.mark.slow)


@pytest.mark.distributed
@pytest.mark.parametrize("options", [{}, SPREAD], ids=["plain", "spread"])
def test_equal_on_two_processes(options: dict[str, Any]) -> None:
    for output, gradient, left in run(rank_errors, 2, "llama", options, False):
        assert output < ALLOWED
        assert gradient < ALLOWED
        assert left == 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("options", [{}, {"sequence_parallel": True}], ids=["plain", "spread"])
def test_equal_under_torch_compile(options: dict[str, Any]) -> None:
    for output, gradient, _ in run(rank_errors, 2, "llama", options, True):
        assert output < ALLOWED
        assert gradient < ALLOWED


def unwaited() -> tuple[int, float]:
    """A sum that is begun has been left in the registry, until it is waited for."""
    x = torch.full((1 << 20,), 1.0 + dist.get_rank())
    group = dist.group.WORLD
    assert group is not None
    y = collectives.all_reduce(x, group.group_name, pending=True)
    left = waiting()
    return left, float(collectives.wait(y)[-1])


@pytest.mark.distributed
def test_a_sum_is_only_started() -> None:
    assert run(unwaited, 2) == [(1, 3.0), (1, 3.0)]


# ------------------------------------------------------------------------------------------------- Inductor
def fusible() -> list[tuple[int, list[int], int, list[bool]]]:
    """Of the forward and the backward graph: all-gathers and their products, reduce-scatters and their products.

    As torch's pass for asynchronous tensor parallelism finds them (it replaces them on GPUs with symmetric memory).
    """
    from functorch.compile import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes import micro_pipeline_tp as pipeline
    from torch._inductor.fx_passes.post_grad import remove_noop_ops, view_to_reshape

    torch.set_num_threads(1)
    found: list[tuple[int, list[int], int, list[bool]]] = []

    def look(module: torch.fx.GraphModule, _: object) -> Any:
        view_to_reshape(module)
        remove_noop_ops(module.graph)
        issued = torch.ops._c10d_functional
        gathers = [n for n in module.graph.nodes if n.target is issued.all_gather_into_tensor.default]
        scatters = [n for n in module.graph.nodes if n.target is issued.reduce_scatter_tensor.default]
        # private functions of the pass
        read: Any = pipeline._find_consumer_matmuls  # pyright: ignore[reportPrivateUsage]
        made: Any = pipeline._find_producer_matmul  # pyright: ignore[reportPrivateUsage]
        consumers = [len(read(match.res_node)) for match in pipeline.find_all_gather_patterns(module.graph)]
        producers = [
            made(match.input_node) is not None for match in pipeline.find_reduce_scatter_patterns(module.graph)
        ]
        found.append((len(gathers), consumers, len(scatters), producers))
        return make_boxed_func(module.forward)

    inputs = {"input_ids": torch.arange(1, 17).view(2, 8), "use_cache": False}
    tp = tpcompile.compile(zoo.build("llama"), example_inputs=inputs, sequence_parallel=True)
    backend = aot_autograd(fw_compiler=look, bw_compiler=look, decompositions=select_decomp_table())
    call: Any = torch.compile(tp, backend=backend, fullgraph=True, dynamic=False)
    tp(**inputs)
    call(**inputs).logits.sum().backward()
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_inductor_finds_the_products_beside_the_collectives_of_sequence_parallelism() -> None:
    for there, back in run(fusible, 2):
        # q, k, v; gate, up; so for two layers; the head; what gathers the logits has no product behind it
        assert there[:2] == (6, [3, 2, 3, 2, 1, 0])
        # o and down of two layers; in front of them the embedding, whose lookup is no product
        assert there[2:] == (5, [False, True, True, True, True])
        # backward: the gradients of q, k, v are added up before they are scattered, those of gate and up too
        assert back[:2] == (5, [1, 1, 1, 1, 0])
        assert back[2:] == (5, [True, False, False, False, False])
