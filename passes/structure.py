"""Structure: give every dim of every value a term of index spaces, by unifying what each op ties together."""

from __future__ import annotations

import operator

import torch
import torch.fx

from tpcompile.program import Program, Structure
from tpcompile.rules import RULES, op_name
from tpcompile.sentence import Sentence, tensor_operands
from tpcompile.structure import Atom, Term, Unifier, atoms

SUMMED = "two values are multiplied and summed along it"
"""Why a head dim is the last thing to cut: attention scores would be partial sums."""


def structure(program: Program) -> Program:
    """Fill ``program.structure``. Knows nothing of specs or placement; unknown ops pin what they touch."""
    unifier = Unifier()
    values: dict[str, tuple[tuple[Term, ...], ...]] = {}
    parameters: dict[str, tuple[Term, ...]] = {}
    weights: set[str] = set()  # parameters, and views and casts of one
    for node in program.graph.nodes:
        unifier.node = node
        value = node.meta.get("val")
        if node.op == "get_attr" and isinstance(value, torch.Tensor):
            name = str(node.target)
            if name not in parameters:
                parameters[name] = tuple(Atom(n, name in program.captured.parameters) for n in program.shape(node))
            values[node.name] = (parameters[name],)
            weights |= {node.name} if name in program.captured.parameters else set()
        elif node.op == "placeholder" and isinstance(value, torch.Tensor):
            values[node.name] = (tuple(Atom(n) for n in program.shape(node)),)
        elif node.op == "call_function" and node.target is operator.getitem:
            source, index = node.args
            if source.name in values and isinstance(value, torch.Tensor):
                values[node.name] = (values[source.name][index],)
        elif node.op == "call_function" and isinstance(value, (torch.Tensor, tuple, list)):
            operands = {x.name for x in tensor_operands(node)}
            weights |= {node.name} if len(operands) == 1 and operands <= weights else set()
            values[node.name] = _tie(program, node, unifier, values, weights)
    return program.with_(structure=Structure(values, parameters))


def _tie(
    program: Program,
    node: torch.fx.Node,
    unifier: Unifier,
    values: dict[str, tuple[tuple[Term, ...], ...]],
    weights: set[str],
) -> tuple[tuple[Term, ...], ...]:
    call = program.call(node)
    fresh = tuple(tuple(Atom(n) for n in shape) for shape in call.results)
    rule = RULES.get(op_name(node))
    try:
        sentence = None if rule is None else rule.sentence(call)
    except ValueError as error:
        sentence, why = None, str(error)
    else:
        why = f"{op_name(node)} has no rule"
    if sentence is None:
        for operand in tensor_operands(node):
            for term in values.get(operand.name, ((),))[0]:
                unifier.pin(term, why)
        return fresh
    operands = [values[x.name][0] for x in call.operands]
    results = _unify_sentence(sentence, operands, unifier)
    if sentence.sums and len(operands) > 1 and not {x.name for x in call.operands} & weights:
        kept = {x for labels in sentence.results for x in labels}
        for labels, dims in zip(sentence.operands, operands, strict=True):
            for label, term in zip(labels, dims, strict=True):
                if label is not None and label not in kept:
                    unifier.pin(term, SUMMED)
    return results


def _unify_sentence(
    sentence: Sentence, operands: list[tuple[Term, ...]], unifier: Unifier
) -> tuple[tuple[Term, ...], ...]:
    terms: dict[str, Term] = {}
    for index, (labels, dims) in enumerate(zip(sentence.operands, operands, strict=True)):
        if index in sentence.references or index in {teller for _, _, teller in sentence.owners}:
            continue
        for label, term in zip(labels, dims, strict=True):
            if label is None:
                continue
            if label in terms:
                unifier.unify(terms[label], term)
            else:
                terms[label] = term

    def term_of(label: str) -> Term:
        if label not in terms:
            terms[label] = Atom(sentence.sizes[label])
        return terms[label]

    for left, right in sentence.products:
        unifier.unify_products([term_of(x) for x in left], [term_of(x) for x in right])
    for whole, parts in sentence.concats:
        spaces = [a for x in (whole, *parts) if x in terms for a in atoms(terms[x])]
        if any(a.from_parameter for a in spaces):
            # only index spaces that a parameter carries are worth refining: slices of positions or labels are not
            unifier.unify_segments(term_of(whole), [term_of(x) for x in parts])
        else:
            for label in (whole, *parts):
                if label in terms:
                    unifier.pin(terms[label], "a slice or concatenation takes part of it")
    for label, reason in sentence.whole.items():
        if label in terms:
            unifier.pin(terms[label], reason)
    return tuple(tuple(Atom(1) if label is None else term_of(label) for label in labels) for labels in sentence.results)


__all__ = ["structure"]
