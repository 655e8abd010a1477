"""Local ranks that answer prompts, for ``tpcompile generate`` and ``tpcompile chat``: text goes in, text streams out.

This process keeps the conversation; prompts and pieces of answers go over a key-value store of torch.distributed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from tpcompile.errors import TpcompileError
from tpcompile.groups import group_device, resolve_group
from tpcompile.launch import launch
from tpcompile.shared_memory import obstacle

LONGEST = 24 * 3600.0  # seconds that ranks wait for a prompt
Message = dict[str, str]  # of a conversation: {"role": "user", "content": "..."}


@dataclass(frozen=True)
class Settings:
    """How answers are made: at most so many new tokens; at temperature 0 the likeliest ones, else drawn."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """For ``generate``."""
        drawn = {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}
        return {"max_new_tokens": self.max_new_tokens, **drawn}


class Ranks:
    """Running ranks that hold a model."""

    def __init__(self, store: TCPStore, ended: Future[Any]):
        self._store, self._ended, self._turn = store, ended, 0

    def _get(self, key: str) -> Any:
        while not self._store.check([key]):
            if self._ended.done():
                self._ended.result()  # raises what ended them
                raise TpcompileError("the ranks ended before they answered")
            time.sleep(0.005)
        return json.loads(self._store.get(key))

    def ready(self) -> float:
        """Wait until the model is compiled on all ranks; the seconds that it took."""
        return float(self._get("ready"))

    def ask(self, prompt: str | Sequence[Message], settings: Settings) -> Iterator[str]:
        """Pieces of the answer to a text, or to a conversation, as they are made."""
        self._store.set(f"turn/{self._turn}", json.dumps({"prompt": prompt, "settings": asdict(settings)}))
        turn, piece, self._turn = self._turn, 0, self._turn + 1
        while (text := self._get(f"answer/{turn}/{piece}")) is not None:
            self._store.delete_key(f"answer/{turn}/{piece}")
            piece += 1
            yield text

    def end(self) -> None:
        """Let the ranks go, and wait for them."""
        self._store.set(f"turn/{self._turn}", json.dumps(None))
        self._ended.result()


@contextlib.contextmanager
def answering(model: str, spec: str | None, degree: int) -> Generator[Ranks]:
    """Start ``degree`` local ranks that hold ``model``; they end with the block.

    Raises:
        TpcompileError: the model has no tokenizer, or does not load, compile or generate.
    """
    left = threading.Event()

    def watch() -> None:
        if left.is_set():
            raise TpcompileError("the ranks were left before they ended")

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    with ThreadPoolExecutor(1) as pool:
        backend = "shm" if obstacle(degree) is None and degree <= len(os.sched_getaffinity(0)) else "gloo"
        ended = pool.submit(launch, _serve, degree, (model, spec, store.port), LONGEST, backend=backend, watch=watch)
        ranks = Ranks(store, ended)
        try:
            yield ranks
        except BaseException:
            left.set()  # Ctrl-C above all: nothing is waited for, launch ends them
            raise
        ranks.end()


def _serve(model: str, spec: str | None, port: int) -> None:
    """The life of one rank: compile, then answer until told to end."""
    with contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        from tpcompile.huggingface import tokenizer

        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
        words: Any = tokenizer(model)
        module = _compiled(model, spec)
        first = dist.get_rank() == 0
        if first:
            store.set("ready", json.dumps(time.perf_counter() - start))
        turn = 0
        while (asked := _next(store, f"turn/{turn}")) is not None:
            settings = Settings(**asked["settings"])
            inputs = encoded(words, asked["prompt"])
            torch.manual_seed(settings.seed)
            stream = _Stream(words, store, f"answer/{turn}") if first else None
            module.generate(**inputs, **settings.arguments(), streamer=stream)
            if stream is not None:
                stream.close()
            turn += 1


def _next(store: TCPStore, key: str) -> Any:
    store.wait([key], timedelta(seconds=LONGEST))
    return json.loads(store.get(key))


def _compiled(model: str, spec: str | None) -> Any:
    """Each rank reads its own parts of the files where that is possible."""
    import tpcompile
    from tpcompile.models import load

    path = Path(model.removeprefix("hf:"))
    if path.exists() and group_device(resolve_group(None)).type == "cpu":
        return tpcompile.from_pretrained(path, spec)
    return tpcompile.compile(load(model, weights=True).model, spec)


def encoded(words: Any, prompt: Any) -> dict[str, torch.Tensor]:
    """Token ids and mask, ``[1, s]``."""
    if isinstance(prompt, str):
        found = dict(words(prompt, return_tensors="pt", return_token_type_ids=False))
        if found["input_ids"].numel() == 0:
            raise TpcompileError(
                f"the prompt has no tokens: {prompt!r}",
                why="there is nothing to continue, and this tokenizer puts no token in front of a text",
                help='write a few words: --prompt "Once upon a time"',
            )
        return found
    if words.chat_template is None:
        raise TpcompileError(
            "the model's tokenizer has no chat template",
            why="it says how the turns of a conversation become one text",
            help="use tpcompile generate with a plain text, or a model that is trained to chat (often called Instruct)",
        )
    return dict(words.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True))


class _Stream:
    """A streamer of transformers: sends whole words of the answer as they come."""

    def __init__(self, words: Any, store: TCPStore, key: str):
        from transformers import TextStreamer

        self._store, self._key, self._count = store, key, 0
        self._inner: Any = TextStreamer(words, skip_prompt=True, skip_special_tokens=True)
        self._inner.on_finalized_text = self._send

    def put(self, value: torch.Tensor) -> None:
        self._inner.put(value)

    def end(self) -> None:
        self._inner.end()

    def _send(self, text: str, stream_end: bool = False) -> None:
        del stream_end
        if text:
            self._write(text)

    def _write(self, text: str | None) -> None:
        self._store.set(f"{self._key}/{self._count}", json.dumps(text))
        self._count += 1

    def close(self) -> None:
        """Say that the answer is complete."""
        self._write(None)


__all__ = ["Message", "Ranks", "Settings", "answering"]
