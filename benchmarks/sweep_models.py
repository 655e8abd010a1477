"""Every model type of transformers, made small, cut without a spec, and compared with one device.

    python benchmarks/sweep_models.py                            the usual class of every type, 2 ranks, eval mode
    python benchmarks/sweep_models.py --degree 2 3 4 --mode train   more rows; those that are there are kept
    python benchmarks/sweep_models.py --classes all              every class of every type
    python benchmarks/sweep_models.py --only llama,gpt2 --show   a few, their records on the terminal
    python benchmarks/sweep_models.py --retry crash,refused      again what ended so
    python benchmarks/sweep_models.py --write-docs               docs/models.md from benchmarks/results/models.json

Each model runs in a forked process of its own, with a limit on time and on memory. A row counts as sharded only where
the comparison holds and a part of the parameters is cut.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "models.json"
DOCS = ROOT / "docs" / "models.md"
MODES = ("eval", "train", "eager")  # eager: in eval mode, with attention written out instead of torch's sdpa
SECONDS = 90  # a row may take
GIGABYTES = 12  # of memory a row may take
LISTED = 10  # reasons in the document

OUTCOMES = {
    "ok": "equal to one device: outputs and every gradient",
    "wrong": "numbers differ from one device",
    "refused": "a typed refusal, with the place and the reason",
    "not captured": "torch.export cannot make one graph of it",
    "crash": "an error that is none of the above: a defect of tpcompile",
    "timeout": "it takes too long",
    "not built": "it cannot be built or called at a small size by this sweep, or needs a package that is not installed",
}

# ------------------------------------------------------------------------------------------------ small configs
WIDTH, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY, EXPERTS, POSITIONS = 64, 96, 4, 2, 16, 96, 4, 64

Change = Callable[[int], int]


def at_most(limit: int) -> Change:
    """A value that may be smaller already."""
    return lambda value: min(value, limit)


# The first row whose pattern is the name of an integer of a config says what becomes of it.
RULES: tuple[tuple[str, Change], ...] = (
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers", at_most(0)),
    (r".*(feat|conv|residual|upsampl|downsampl|resnet|stage|adapter|stack).*|num_encoder_blocks", lambda value: value),
    (r"n_layers?|depth|num_blocks|(\w+_)?num_(\w+_)?layers|(\w+_)?(encoder|decoder|self|cross)_layers", at_most(2)),
    (r"num_layers|num_\w+_blocks|\w+_depth|num_self_attends_per_block|num_hidden_groups|inner_group_num", at_most(2)),
    (r"first_k_dense_replace|num_dense_layers|n_dense_layers|topk_group", at_most(1)),
    (r"mamba_(n|num)_heads", at_most(8)),
    (r"(mamba_)?n_groups|ssm_n_groups|mamba_num_groups", at_most(2)),
    (r"\w*(kv|key_value|groups?)_heads|multi_query_group_num|num_kv|\w*linear_num_key_heads", at_most(KV_HEADS)),
    (r"\w*(num|n)_\w*heads|n_heads?|\w*attention_heads|\w*num_heads", at_most(HEADS)),
    (r"qk_head_dim", at_most(24)),
    (r"qk_rope_head_dim|rotary_dim|rope_dim", at_most(8)),
    (r"\w*head_dim|d_kv|kv_channels|\w*head_size|dim_head|\w*d_head", at_most(HEAD)),
    (r"\w*lora_rank|lora_dim|\w*_low_rank_dim", at_most(32)),
    (r"\w*(intermediate|ffn|inner|ff|mlp|feed_?forward|expansion)_?(size|dim|hidden_size|hidden_dim)s?|n_inner|d_ff",
     at_most(INNER)),
    (r"\w*d_inner|\w*filter_size|shared_expert_intermediate_size|dim_feedforward", at_most(INNER)),
    (r"\w*vocab_?size\w*", at_most(VOCABULARY)),
    (r"\w*(num|n)_\w*experts|moe_num_experts|num_experts", at_most(EXPERTS)),
    (r"\w*experts_per_tok(en)?|moe_top_?k|num_selected_experts|\w*top_?k_experts|n_group", at_most(2)),
    (r"max_source_positions|max_target_positions", at_most(32)),
    (r"\w*(max_position|n_positions|max_seq_len|max_sequence_length|n_ctx|max_len|seq_length)\w*", at_most(POSITIONS)),
    (r"(mamba_)?d_state|state_size|ssm_state_size", at_most(8)),
    (r"(mamba_)?chunk_size", at_most(4)),
    (r"index_topk", at_most(4)),
    (r"index_kpool|window_size", at_most(2)),
    (r"num_conv_pos_embeddings", at_most(16)),
    (r"(\w+_)?(hidden|embed|embedding|model|proj|projection|projector|output|feature)_?(size|dim)s?", at_most(WIDTH)),
    (r"d_model|n_embd|width|dim|embed_dim|d_embed|\w+_width|attn_dim|d_attn|\w*hidden_channels", at_most(WIDTH)),
    (r"(tokens|mm_tokens)_per_image|num_latents|num_quer(y_tokens|ies)|num_query_tokens", at_most(16)),
)  # fmt: skip
IMAGES = ("image_size", "pretrain_image_size", "img_size", "pretrained_image_size")
IMAGE = 64
TOKEN = re.compile(r"\w*(token_id|token_index|_id|token_ids)")

# What the rules above cannot know, by model type: values of its config, or of a config inside it.
SECTIONS = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 3, 3]}
PLAIN_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
RESNET = {"model_type": "resnet", "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "embedding_size": 16,
          "out_features": ["stage2", "stage3", "stage4"]}  # fmt: skip
PLAIN_BACKBONE = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
                  "backbone_config": RESNET}  # fmt: skip
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3]}
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "glm4v_text": {"rope_parameters": SECTIONS},
    "glm4v_moe_text": {"rope_parameters": {**SECTIONS, "partial_rotary_factor": 1.0}},
    "glm_image_text": {"rope_parameters": SECTIONS},
    "glm_ocr_text": {"rope_parameters": SECTIONS},
    "qwen2_vl_text": {"rope_parameters": SECTIONS},
    "qwen2_5_vl_text": {"rope_parameters": SECTIONS},
    "qwen2_5_omni_text": {"rope_parameters": SECTIONS},
    "paddleocr_vl_text": {"rope_parameters": SECTIONS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 48},
    "efficientnet": {"hidden_dim": 2560},
    "audio-spectrogram-transformer": {"max_length": 64},
    "conditional_detr": PLAIN_BACKBONE,
    "dab-detr": PLAIN_BACKBONE,
    "deformable_detr": PLAIN_BACKBONE,
    "detr": PLAIN_BACKBONE,
    "table-transformer": PLAIN_BACKBONE,
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    "dots3_note_vision_encoder": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
    "informer": SERIES,
    "autoformer": SERIES,
    "time_series_transformer": SERIES,
    "granite_speech5_encoder": {"context_size": 16},
    "granite_speech5_ctc": {"context_size": 16},
    "longcat_flash": {"head_dim": 8},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
    "canine": {"num_hash_buckets": 64},
    "ernie4_5_vl_moe_text": {"rope_parameters": SECTIONS, "moe_intermediate_size": [INNER, INNER]},
    "hunyuan_vl_text": {"rope_parameters": SECTIONS},
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_k": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "mimi": {"upsample_groups": WIDTH},
    "mimi_decoder": {"upsample_groups": WIDTH},
    "pocket_tts_audio_tokenizer": {"upsample_groups": WIDTH},
    "pocket_tts_audio_tokenizer_decoder": {"upsample_groups": WIDTH},
    "efficientloftr": {"hidden_size": 256},
    "gradium_phonon_tts_flow_head": {"condition_dim": WIDTH},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "reformer": {"axial_pos_embds": False},
    "diffusion_gemma_text": {"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": INNER},
    "chameleon": {"vocabulary_map": {"<image>": VOCABULARY - 1}},
    "vitmatte": {"fusion_hidden_sizes": [256, 128, 64, 32]},
    "qwen4_exp_text": {"token_budget": 8, "compress_ratio": 2},
    "gemma4_assistant_text": {"hidden_size_per_layer_input": 0},
    "grounding-dino": {"num_queries": 8},
    "mm-grounding-dino": {"num_queries": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "step3p5": {"sliding_window": 4},
    "sam2_hiera_det_model": {"hidden_size": 96},
    "sapiens2": {"num_key_value_heads": HEADS},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 768},
    "fun_asr_nano_adaptor": {"intermediate_size": 16},
    "nemotron_h_omni": {"video_temporal_patch_size": None},
}


def shrunk(config_class: Any, taken: dict[int, int] | None = None, default: Any = None) -> Any:
    """A small config of the class: two layers, or one of each kind; the relations between sizes are kept."""
    return config_class.from_dict(_small(config_class, {} if taken is None else taken, default))


def _small(config_class: Any, taken: dict[int, int], default: Any) -> dict[str, Any]:
    """Values that differ from the default ones, or that are small already."""
    default = config_class() if default is None else default
    changed: dict[str, Any] = {}
    places, layers = _kinds_of_layers(default)
    stages = any(isinstance(vars(default).get(name), list | tuple) for name in ("depths", "hidden_sizes"))
    for item in fields(config_class):
        name, value = item.name, vars(default).get(item.name)
        if hasattr(value, "to_diff_dict") and hasattr(type(value), "model_type"):
            changed[name] = {"model_type": value.model_type, **_small(type(value), taken, value)}
        elif value is None and name in MISSING:
            changed[name] = MISSING[name]
        elif isinstance(value, bool) and isinstance(item.default, bool) and value != item.default:
            changed[name] = value
        elif isinstance(value, bool) or value is None or name.startswith("_") or name in UNCHANGED:
            continue
        elif isinstance(value, list | tuple) and places and len(value) == layers:
            changed[name] = [value[i] for i in places]
        elif TOKEN.fullmatch(name):
            changed[name] = _tokens(value, taken)
        elif name in IMAGES:
            changed[name] = _image(value, vars(default).get("patch_size"))
        elif name == "decoder_in_channels":
            changed[name] = [min(n, WIDTH) for n in value]
        elif name == "depths":
            changed[name] = [min(n, 2) for n in value]
        elif isinstance(value, Mapping) and ("rope" in name):
            if (rope := _rope(value)) != value:
                changed[name] = rope
        elif isinstance(value, int) and not (stages and re.fullmatch(r"embed_dim|hidden_size|num_heads", name)):
            small = next((rule(value) for pattern, rule in RULES if re.fullmatch(pattern, name)), value)
            if item.default is not None or small != value:
                changed[name] = small
        elif isinstance(value, int | float | str) and item.default is not None and value != item.default:
            changed[name] = value
    taps = getattr(default, "out_indices", None) or ()  # what a backbone hands on
    if taps and stages:
        changed["out_indices"] = list(taps)
    elif len(taps) > 1:
        changed |= {"out_indices": list(range(1, len(taps) + 1))} | {
            name: len(taps) for name in LAYERS if name in changed
        }
    if places:
        changed |= {name: len(places) for name in LAYERS if isinstance(vars(default).get(name), int)}
    for name, value in changed.items():
        heads = name.replace("key_value_heads", "attention_heads")
        if heads != name and value and vars(default).get(heads) == vars(default).get(name):
            changed[name] = changed.get(heads, value)
    return changed | dict(OVERRIDES.get(config_class.model_type, {}))


UNCHANGED = frozenset(
    [
        "transformers_version",
        "architectures",
        "output_hidden_states",
        "return_dict",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "id2label",
        "label2id",
        "problem_type",
        "dtype",
    ]
)
MISSING = {"head_dim": HEAD, "num_key_value_heads": HEADS}  # sizes that some configs leave to others, and never say
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def _kinds_of_layers(config: Any) -> tuple[list[int], int]:
    """The first layer of each kind, by the lists that have an entry a layer (none: no such lists), and how many are."""
    layers = next((n for name in LAYERS if isinstance(n := vars(config).get(name), int)), 0)
    lists = [
        value
        for item in fields(config)
        if isinstance(value := vars(config).get(item.name), list | tuple) and len(value) == layers > 2
    ]
    if not lists:
        return [], layers
    first: dict[str, int] = {}
    for place, kind in enumerate(zip(*lists, strict=True)):
        first.setdefault(repr(kind), place)
    places = sorted(first.values())[:4]
    return (places if len(places) > 1 else [0, 1]), layers


def _tokens(value: Any, taken: dict[int, int]) -> Any:
    """Ids of tokens within the small vocabulary; ids that were the same stay the same, others stay different."""
    if isinstance(value, list | tuple):
        return [_tokens(one, taken) for one in value]
    if not isinstance(value, int) or value < VOCABULARY - 16:
        return value
    return taken.setdefault(value, VOCABULARY - 1 - len(taken) % 16)


def _image(value: Any, patch: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_image(one, patch) for one in value]
    return min(value, 4 * patch if isinstance(patch, int) and patch > 6 else IMAGE) if isinstance(value, int) else value


def _rope(value: Any) -> Any:
    """Lists of rope that have an entry a pair of dims, or add up to them, for the small head."""
    if isinstance(value, Mapping):
        return {
            key: (
                [one[0]] * (HEAD // 2)
                if key in ("short_factor", "long_factor") and isinstance(one, list)
                else _sections(one)
                if key.endswith("section") and isinstance(one, list | tuple)
                else _rope(one)
            )
            for key, one in value.items()
        }
    return value


def _sections(parts: Sequence[int]) -> list[int]:
    small = [max(1, part * HEAD // 2 // sum(parts)) for part in parts]
    return [*small[:-1], HEAD // 2 - sum(small[:-1])]


# ------------------------------------------------------------------------------------------------ one model
@dataclass(frozen=True)
class Record:
    """One row: a class of a model type, on so many ranks, in one of ``MODES``."""

    type: str
    cls: str
    degree: int
    mode: str
    outcome: str
    stage: str = "done"  # where it ended
    reason: str | None = None  # first line of the error
    where: str | None = None  # the model's own line, or the line that raised
    cut: float = 0.0  # share of the elements of all parameters that is cut
    used: float = 0.0  # share that the example call uses
    layers: int = 0  # repeated ones
    forward: int = 0  # collectives of activations in a step
    backward: int = 0
    layer_forward: float = 0.0  # those per repeated layer
    layer_backward: float = 0.0
    output_error: float | None = None  # worst relative ones in fp64
    gradient_error: float | None = None
    native_error: float | None = None  # against the eager model in its own precision
    seconds: float = 0.0
    capture_seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What a row is found again by."""
        return self.type, self.cls, self.mode, self.degree

    @property
    def sharded(self) -> bool:
        """Equal, and with parameters that are really cut."""
        return self.outcome == "ok" and self.cut > 0


def records(kind: str, class_name: str, mode: str, degrees: Iterable[int]) -> Iterator[Record]:
    """The rows of one class, one a degree."""
    import torch

    from tpcompile import example_inputs, huggingface

    blank = Record(kind, class_name, min(degrees), mode, "not built")
    start = time.perf_counter()
    try:
        stage = "config"
        transformers = importlib.import_module("transformers")
        config = shrunk(transformers.CONFIG_MAPPING[kind])
        stage = "class"
        cls = huggingface.usual_class(config, kind, class_name)
        stage = "build"
        model = huggingface.build(config, cls)
        if mode == "eager":
            model.set_attn_implementation("eager")
            if model.config._attn_implementation != "eager":
                raise TypeError("its attention cannot be set")
        stage = "inputs"
        args, kwargs = example_inputs.default_inputs(model)
        model.train(mode == "train")
        stage = "call"
        with torch.no_grad():
            leaves = torch.utils._pytree.tree_leaves(model(*args, **kwargs))
        if any(x.isnan().any() for x in leaves if isinstance(x, torch.Tensor)):
            raise FloatingPointError("the model itself returns NaN at this size")
    except Exception as error:  # noqa: BLE001  (whatever a library raises)
        what, where = told(error)
        for degree in degrees:
            yield replace(blank, degree=degree, stage=stage, reason=what, where=where, seconds=since(start))
        return
    yield from compared(model, (args, kwargs), [replace(blank, degree=degree) for degree in degrees])


def compared(model: Any, inputs: tuple[tuple[Any, ...], dict[str, Any]], blanks: Sequence[Record]) -> Iterator[Record]:
    """Captured once, planned and rewritten for every degree, and compared with one device."""
    from tpcompile.capture import capture
    from tpcompile.compiler import rewrite_captured
    from tpcompile.equivalence import verify_program
    from tpcompile.errors import CaptureError, TpcompileError
    from tpcompile.planner import plan_captured

    start = time.perf_counter()
    try:
        captured = capture(model, *inputs)
    except Exception as error:  # noqa: BLE001
        outcome = "not captured" if isinstance(error, CaptureError) else "crash"
        what, where = told(error)
        failed = {"outcome": outcome, "stage": "capture", "reason": what, "where": where, "seconds": since(start)}
        yield from (replace(blank, **failed) for blank in blanks)
        return
    capture_seconds = since(start)
    for blank in blanks:
        start, stage = time.perf_counter(), "plan"
        blank = replace(blank, capture_seconds=capture_seconds)
        try:
            spec = plan_captured(captured, blank.degree, inputs)
            stage = "rewrite"
            program = rewrite_captured(captured, spec, model, blank.degree, inputs)
            stage = "compare"
            report = verify_program(program, model, example(inputs))
        except Exception as error:  # noqa: BLE001
            what, where = told(error)
            outcome = "refused" if isinstance(error, TpcompileError) else "crash"
            yield replace(blank, outcome=outcome, stage=stage, reason=what, where=where, seconds=since(start))
            continue
        errors = (report.output_error, report.gradient_error, report.native_output_error)
        output, gradient, native = (error if math.isfinite(error) else None for error in errors)
        blank = replace(blank, **described(program), seconds=since(start))
        blank = replace(blank, output_error=output, gradient_error=gradient, native_error=native)
        if report.ok:
            yield replace(blank, outcome="ok")
        else:
            said = (report.mismatch or "").splitlines()[0]
            outcome = "crash" if "cannot be computed" in said else "wrong"  # it has no numbers, or other ones
            yield replace(blank, outcome=outcome, stage="compare", reason=said)


def example(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """As ``verify`` takes them."""
    return inputs[1] or inputs[0]


def described(program: Any) -> dict[str, Any]:
    """What is cut, and what it costs."""
    from tpcompile.layers import repeated_layers
    from tpcompile.layout import axes_of

    captured = program.captured
    read = {str(node.target) for node in captured.graph_module.graph.nodes if node.op == "get_attr"}
    total = max(1, sum(p.numel() for p in captured.parameters.values()))
    used = sum(p.numel() for name, p in captured.parameters.items() if name in read)
    is_cut = {name for name, dims in program.parameters.items() if any(axes_of(d) for d in dims)}
    cut = sum(p.numel() for name, p in captured.parameters.items() if name in is_cut)
    entered = {path for node in captured.graph_module.graph.nodes for path in node.meta.get("modules") or ()}
    layers = repeated_layers(captured.module_classes) & entered
    sent, inside = Counter[str](), Counter[str]()
    for row in program.collectives:
        if row.of == "activations":
            sent[row.direction] += row.count
            if any(row.module == layer or row.module.startswith(f"{layer}.") for layer in layers):
                inside[row.direction] += row.count
    return {
        "cut": round(cut / total, 4), "used": round(used / total, 4), "layers": len(layers),
        "forward": sent["forward"], "backward": sent["backward"],
        "layer_forward": round(inside["forward"] / max(1, len(layers)), 2),
        "layer_backward": round(inside["backward"] / max(1, len(layers)), 2),
    }  # fmt: skip


def told(error: BaseException) -> tuple[str, str | None]:
    """The first line of an error, and a place: the model's own line where it has one, else the line that raised."""
    import traceback

    place = getattr(error, "where", None)
    if hasattr(error, "what"):
        said = str(error.what)
        if error.why:
            said += f": {error.why.splitlines()[0]}"
        at = f"{place.file}:{place.line}" if place is not None and place.file else None
        if place is not None and place.op:
            at = f"{place.op} at {at}" if at else place.op
        return said[:400], at
    said = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "tpcompile" in f.filename or "passes" in f.filename] or frames
    at = f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}" if own else None
    return f"{type(error).__name__}: {said}"[:400], at


def since(start: float) -> float:
    """Seconds."""
    return round(time.perf_counter() - start, 2)


# ------------------------------------------------------------------------------------------------ many models
@dataclass(frozen=True)
class Case:
    """One process: a class in a mode, on all degrees that are still to do."""

    type: str
    cls: str
    mode: str
    degrees: tuple[int, ...]


@dataclass
class Worker:
    """A forked process on its case, and where its rows arrive."""

    case: Case
    process: Any
    rows: Any
    left: list[int]
    seconds: float  # a row may take
    deadline: float


def start(case: Case, seconds: float) -> Worker:
    """Fork; what is imported here already is there at once."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(case, send), daemon=True)
    process.start()
    send.close()
    return Worker(case, process, receive, list(case.degrees), seconds, time.monotonic() + seconds)


def work(case: Case, send: Any) -> None:
    """The child: quiet, limited, one row after the other."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES << 30,) * 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    for row in records(case.type, case.cls, case.mode, case.degrees):
        send.send(row)
    send.close()


def advance(worker: Worker) -> tuple[list[Record], bool]:
    """Rows that have arrived, and whether the process has ended, by itself or by its limits."""
    found: list[Record] = []
    alive = worker.process.is_alive()  # asked first: the last row may be sent, and the process end, at any time
    with contextlib.suppress(EOFError, OSError):
        while worker.rows.poll():
            row = worker.rows.recv()
            found.append(row)
            worker.left.remove(row.degree)
            worker.deadline = time.monotonic() + worker.seconds
    late = time.monotonic() > worker.deadline
    if alive and not late:
        return found, False
    if late:
        worker.process.kill()
    worker.process.join()
    worker.rows.close()
    case, ended = worker.case, f"the process ended with {worker.process.exitcode}"
    outcome, reason = ("timeout", f"more than {worker.seconds:g} s") if late else ("crash", ended)
    for degree in worker.left:
        found.append(Record(case.type, case.cls, degree, case.mode, outcome, "process", reason, seconds=worker.seconds))
    return found, True


def read() -> dict[tuple[str, str, str, int], Record]:
    """The rows that are there."""
    if not RESULTS.exists():
        return {}
    known = {item.name for item in fields(Record)}
    rows = [Record(**{k: v for k, v in row.items() if k in known}) for row in json.loads(RESULTS.read_text())["rows"]]
    return {row.key: row for row in rows}


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Rows are read, added to and written by one sweep at a time."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(RESULTS.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def write(rows: Mapping[tuple[str, str, str, int], Record]) -> None:
    """All rows at once, or none: the old file stays until the new one is whole."""
    from importlib.metadata import version

    head = {"command": "python benchmarks/sweep_models.py"} | {n: version(n) for n in ("torch", "transformers")}
    part = RESULTS.with_suffix(".part")
    lines = ",\n".join(json.dumps(asdict(rows[key])) for key in sorted(rows))
    part.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]}}\n')
    part.replace(RESULTS)


# ------------------------------------------------------------------------------------------------ what to run
def catalogue() -> dict[str, list[str]]:
    """The classes of every model type, the usual one first. In a process of its own: it imports every model."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_catalogue, args=(send,), daemon=True)
    process.start()
    send.close()
    found = receive.recv()
    process.join()
    return found


def _catalogue(send: Any) -> None:
    from tpcompile import huggingface

    transformers = importlib.import_module("transformers")
    found: dict[str, list[str]] = {}
    for kind, config_class in transformers.CONFIG_MAPPING.items():
        names = [cls.__name__ for cls in huggingface.classes(config_class)]
        try:
            names.insert(0, huggingface.usual_class(config_class(), kind).__name__)
        except Exception:  # noqa: BLE001  (no class in the library's tables, or a package that is not installed)
            names = names or ["(none)"]
        found[kind] = list(dict.fromkeys(names))
    send.send(found)


def cases(options: argparse.Namespace, known: Mapping[str, list[str]], done: Iterable[Record]) -> list[Case]:
    """Processes to start: classes with rows that are missing or are to be made again."""
    kinds = list(dict.fromkeys(options.only.split(","))) if options.only else list(known)
    again = set(options.retry.split(",")) if options.retry else set[str]()
    rows = {row.key: row for row in done}
    found: list[Case] = []
    for mode in options.mode:
        for kind in kinds:
            for name in known[kind] if options.classes == "all" or options.cls else known[kind][:1]:
                if options.cls is not None and name != options.cls:
                    continue
                before = {degree: rows.get((kind, name, mode, degree)) for degree in options.degree}
                first = rows.get((kind, name, "eval", 2))
                if options.passing and (first is None or first.outcome != "ok"):
                    continue
                todo = tuple(d for d, row in before.items() if row is None or row.outcome in again or options.again)
                if todo:
                    found.append(Case(kind, name, mode, todo))
    return found


def sweep(todo: Sequence[Case], jobs: int = 1, show: bool = False, seconds: float = SECONDS) -> None:
    """Run the cases, so many at once, and record every row as it arrives."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    counts: Counter[str] = Counter()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    waiting, running = list(reversed(todo)), list[Worker]()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no fork is left behind
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(todo))
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(start(waiting.pop(), seconds))
                multiprocessing.connection.wait([worker.process.sentinel for worker in running], timeout=0.05)
                for worker in list(running):
                    arrived, ended = advance(worker)
                    if arrived:
                        with locked():
                            write(read() | {row.key: row for row in arrived})
                    for row in arrived:
                        counts[row.outcome] += 1
                        if show or not console.is_terminal:
                            console.print(line(row), soft_wrap=True, highlight=False, markup=False)
                    if ended:
                        running.remove(worker)
                        progress.advance(task)
                    said = "  ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
                    progress.update(task, description=f"{worker.case.type}  {said}")
        finally:
            for worker in running:
                worker.process.kill()
                worker.process.join()


def line(row: Record) -> str:
    """A record on one line of a terminal."""
    said = f"{row.type} {row.cls} {row.mode} {row.degree}: {row.outcome}"
    if row.outcome == "ok":
        errors = f"{row.output_error:.0e} {row.gradient_error:.0e}"
        return f"{said}, {row.cut:.0%} cut, {row.forward}+{row.backward} collectives, {errors}, {row.seconds} s"
    return f"{said} ({row.stage}) {row.reason}" + (f" [{row.where}]" if row.where else "") + f", {row.seconds} s"


def imports() -> None:
    """What every fork needs and nobody edits: torch, its tracer, transformers. Each fork reads tpcompile itself."""
    import networkx  # noqa: F401
    import torch
    import torch.export
    import transformers.modeling_utils  # noqa: F401

    torch.set_num_threads(1)
    torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(3, 2),))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TYPE,...", help="these model types only")
    parser.add_argument("--class", dest="cls", metavar="CLASS", help="this class only")
    parser.add_argument("--classes", choices=("usual", "all"), default="usual")
    parser.add_argument("--degree", type=int, nargs="+", default=[2])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["eval"])
    parser.add_argument("--passing", action="store_true", help="only classes that are equal at degree 2 in eval mode")
    parser.add_argument("--retry", metavar="OUTCOME,...", help="make rows that ended so again")
    parser.add_argument("--again", action="store_true", help="make all rows again")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that a row may take")
    parser.add_argument("--show", action="store_true", help="print every row")
    parser.add_argument("--write-docs", action="store_true", help=f"write {DOCS.relative_to(ROOT)} and stop")
    options = parser.parse_args()
    if options.write_docs:
        DOCS.write_text(document(json.loads(RESULTS.read_text()) | {"rows": list(read().values())}))
        return
    imports()
    known = catalogue()
    missing = [kind for kind in options.only.split(",") if kind not in known] if options.only else []
    if missing:
        parser.error(f"no such model type: {', '.join(missing)}")
    with locked():  # rows of another version of the library, or of this file
        write({key: row for key, row in read().items() if row.cls in known.get(row.type, ())})
    sweep(cases(options, known, read().values()), options.jobs, options.show, options.seconds)


# ------------------------------------------------------------------------------------------------ the document
HEAD_OF_DOCUMENT = """\
# Models

Made by `python benchmarks/sweep_models.py --write-docs` from `benchmarks/results/models.json`: torch {torch},
transformers {transformers}.

Every model type of the library is made small by a few rules (two layers, or one of each kind; 64 wide, 4 heads, 2 kv
heads, 96 tokens, 4 experts), drawn at random, captured, planned **without a spec**, rewritten, and compared with one
device in fp64: outputs and every gradient. The weights are not real and the layers are few; the graphs are the
library's own.

* **sharded**: equal to one device, and a part of the parameters is cut. Only these count.
* **whole**: equal, but every rank holds everything: nothing worth cutting was found, or nothing that can be cut.
* *cut* is the share of the elements of all parameters that belongs to parameters that are cut; *used* is the share that
  the example call reads. Models of text and images are called with text alone, unless they need both.
* *eager* rows are in eval mode with attention written out (`attn_implementation="eager"`), the others with what the
  class takes by default, mostly fused attention.
* *collectives* are those of activations in one step, forward + backward; *per layer* those inside repeated layers.
  Megatron's floor for a Transformer layer is 2 + 2, and 1 + 1 with a parallel residual.
"""


def document(results: Mapping[str, Any]) -> str:
    """docs/models.md: the rates, the most common reasons for the rest, and a row a class, mode and degree."""
    rows = sorted(results["rows"], key=lambda row: (row.cls.lower(), row.key))
    head = HEAD_OF_DOCUMENT.format(torch=results["torch"], transformers=results["transformers"])
    return "\n".join([head, *_rates(rows), *_reasons(rows), *_tables(rows)]) + "\n"


def _rates(rows: Sequence[Record]) -> Iterator[str]:
    built = [row for row in rows if row.outcome != "not built"]
    sharded = {row.cls for row in rows if row.sharded}
    types = {row.type for row in rows if row.sharded}
    yield "## Rates\n"
    yield f"**{len(sharded)} classes** of {len(types)} model types are captured, sharded and equal to one device.\n"
    yield from (f"* *{outcome}*: {meaning}." for outcome, meaning in OUTCOMES.items() if outcome != "ok")
    yield "\n| ranks | mode | rows | sharded | whole | wrong | refused | not captured | crash | timeout |"
    yield "|" + "---|" * 10
    for mode, degree in sorted({(row.mode, row.degree) for row in built}):
        here = [row for row in built if (row.mode, row.degree) == (mode, degree)]
        good = sum(row.sharded for row in here)
        count = Counter(row.outcome for row in here)
        numbers = (
            good,
            count["ok"] - good,
            *(count[o] for o in ("wrong", "refused", "not captured", "crash", "timeout")),
        )
        cells = " | ".join(f"{n} ({n / len(here):.0%})" for n in numbers)
        yield f"| {degree} | {mode} | {len(here)} | {cells} |"
    good = [row for row in rows if row.sharded]
    if good:
        output, gradient = (
            max(getattr(row, f"{kind}_error") or 0.0 for row in good) for kind in ("output", "gradient")
        )
        yield f"\nWorst relative errors of all of them in fp64: {output:.0e} in outputs, {gradient:.0e} in gradients.\n"
        layered = [row for row in good if row.layers and (row.mode, row.degree) == ("eval", 2)]
        floor = sum(row.layer_forward <= 2 and row.layer_backward <= 2 for row in layered)
        yield f"{floor} of {len(layered)} with repeated layers need at most 2 + 2 collectives a layer (2 ranks, eval)."
    left = {row.cls if row.cls != "(none)" else row.type for row in rows if row.outcome == "not built"}
    yield f"\nNot built, and not counted above: {len(left)} classes and types.\n"


def _reasons(rows: Sequence[Record]) -> Iterator[str]:
    """The most common reasons, those of classes at their smallest degree."""
    first: dict[tuple[str, str], Record] = {}
    for row in rows:
        first.setdefault((row.cls, row.mode), row)
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in first.values():
        if row.outcome not in ("ok", "not built"):
            groups.setdefault((row.outcome, alike(row.reason or "")), []).append(row)
    yield f"## The {LISTED} most common reasons for the rest\n"
    yield "| classes | outcome | reason | for instance |"
    yield "|---|---|---|---|"
    for (outcome, _), found in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:LISTED]:
        where = f", {cell(found[0].where, 70)}" if found[0].where else ""
        yield f"| {len(found)} | {outcome} | {cell(alike(found[0].reason or ''), 160)} | {found[0].cls}{where} |"
    yield ""


def alike(reason: str) -> str:
    """A reason without what tells two models apart: names of classes and parameters, and numbers."""
    reason = re.sub(r"\b\w*(Model|Encoder|Decoder|Backbone|For[A-Z]\w+)\b", "the model", reason)
    reason = re.sub(r"`[^`]*`", "`...`", reason)
    return re.sub(r"(?<![A-Za-z0-9])\d+(\.\d+)?(e[-+]?\d+)?", "N", reason)


def cell(text: str, width: int) -> str:
    """Text for one cell of a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= width else text[: width - 3] + "..."


def _tables(rows: Sequence[Record]) -> Iterator[str]:
    yield "## Sharded and equal\n"
    yield "| class | type | ranks | mode | cut | used | collectives | per layer | outputs | gradients |"
    yield "|" + "---|" * 10
    for row in (row for row in rows if row.sharded):
        layer = f"{row.layer_forward:g} + {row.layer_backward:g}" if row.layers else ""
        yield (
            f"| {row.cls} | {row.type} | {row.degree} | {row.mode} | {row.cut:.0%} | {row.used:.0%} | {row.forward} + "
            f"{row.backward} | {layer} | {row.output_error:.0e} | {row.gradient_error:.0e} |"
        )
    whole = [row for row in rows if row.outcome == "ok" and not row.sharded]
    yield "\n## Equal, but whole on every rank\n"
    yield ", ".join(sorted({f"{row.cls} ({row.type})" for row in whole})) or "None."
    for title, outcomes in (("Not equal, or not at all", ("wrong", "refused", "not captured", "crash", "timeout")),
                            ("Not built", ("not built",))):  # fmt: skip
        yield f"\n## {title}\n"
        yield "| class | type | ranks | mode | outcome | reason |"
        yield "|---|---|---|---|---|---|"
        for row in (row for row in rows if row.outcome in outcomes):
            reason = cell(row.reason or "", 140) + (f" ({cell(row.where, 70)})" if row.where else "")
            yield f"| {row.cls} | {row.type} | {row.degree} | {row.mode} | {row.outcome} | {reason} |"


if __name__ == "__main__":
    main()
