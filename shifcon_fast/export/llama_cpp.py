"""llama.cpp's own library, to look at a control vector with the program that uses it.

Token ids in, logits out, on the CPU, with the cache and the attention in float32: what is compared is the model,
not the server's settings.

``llama-cpp-py-sync`` has the library and its declarations. Its Linux wheels need glibc 2.38; where that is too
new, the library is taken from the wheel ``xllamacpp``, which exports the same functions and runs everywhere.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from shifcon_fast.extras import MissingExtraError, needed_for

_FLOAT32, _NO_FLASH_ATTENTION = 0, 0  # GGML_TYPE_F32, LLAMA_FLASH_ATTN_TYPE_DISABLED
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_DIRECTION = "direction."


class LlamaCpp:
    """A GGUF model in llama.cpp. As a context manager it is freed at the end.

    Args:
        path: the model file.
        context: longest sequence, in tokens.

    Attributes:
        architecture: ``general.architecture`` of the file.
        num_blocks, hidden_size, vocabulary: what llama.cpp read from it.

    Raises:
        ValueError: not a model that llama.cpp loads. MissingExtraError: not
            installed, or no library that loads here.
    """

    def __init__(self, path: str | Path, context: int = 512) -> None:
        self._ffi, self._lib, _ = _library()
        self._lib.llama_log_set(_listener(self._ffi)[0], self._ffi.NULL)
        self._lib.llama_backend_init()
        self._model = self._context = None
        settings = self._lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; wanted a GGUF model")
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), settings)
        if self._model == self._ffi.NULL:
            raise ValueError(f"{path}: llama.cpp does not load it ({_said(self._ffi)}); wanted a GGUF model")
        self.architecture = self._metadata("general.architecture")
        self.num_blocks = int(self._lib.llama_model_n_layer(self._model))
        self.hidden_size = int(self._lib.llama_model_n_embd(self._model))
        self.vocabulary = int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model)))
        running = self._lib.llama_context_default_params()
        running.n_ctx = running.n_batch = running.n_ubatch = context
        running.n_threads = running.n_threads_batch = torch.get_num_threads()
        running.type_k = running.type_v = _FLOAT32
        running.flash_attn_type = _NO_FLASH_ATTENTION
        self._context = self._lib.llama_init_from_model(self._model, running)
        if self._context == self._ffi.NULL:
            raise ValueError(f"{path}: llama.cpp makes no context of {context} tokens for it")

    def logits(self, tokens: Sequence[int], start: int = 0) -> Tensor:
        """Run tokens of one sequence at positions ``start`` …; what the cache holds before them is used.

        Returns:
            (T, vocabulary) float32.

        Raises:
            ValueError: llama.cpp refuses them (an id out of range, more than the context).
        """
        if start == 0:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index] = token
                batch.pos[index] = start + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = 1
            if code := self._lib.llama_decode(self._context, batch):
                raise ValueError(f"tokens: llama_decode ended with {code}")
            rows = [self._row(index) for index in range(len(tokens))]
        finally:
            self._lib.llama_batch_free(batch)
        return torch.stack(rows)

    def set_control_vector(self, directions: Tensor | None) -> None:
        """Add vectors to the outputs of blocks 1 … from now on; the cache is emptied.

        Args:
            directions: (blocks - 1, d) float32, as :func:`read_control_vector` gives them; None for none.

        Raises:
            ValueError: another hidden size or depth; llama.cpp refuses them.
        """
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        if directions is None:
            self._lib.llama_set_adapter_cvec(
                self._context, self._ffi.NULL, 0, self.hidden_size, 1, self.num_blocks
            )
            return
        if directions.shape[1] != self.hidden_size or directions.shape[0] >= self.num_blocks:
            raise ValueError(
                f"directions: got {tuple(directions.shape)}; wanted at most ({self.num_blocks - 1}, "
                f"{self.hidden_size}), as the model has"
            )
        flat = directions.contiguous().flatten().float()
        data = self._ffi.cast("const float *", flat.data_ptr())
        code = self._lib.llama_set_adapter_cvec(
            self._context, data, flat.numel(), self.hidden_size, 1, self.num_blocks
        )
        if code:
            raise ValueError(f"directions: llama_set_adapter_cvec ended with {code}")

    def close(self) -> None:
        """Free the model."""
        if self._context is not None:
            self._lib.llama_free(self._context)
        if self._model is not None:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _metadata(self, key: str) -> str:
        buffer = self._ffi.new("char[256]")
        self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, 256)
        return str(self._ffi.string(buffer).decode())

    def _row(self, index: int) -> Tensor:
        row = self._lib.llama_get_logits_ith(self._context, index)
        if row == self._ffi.NULL:
            raise ValueError(f"tokens: llama.cpp has no logits of token {index}")
        values = self._ffi.buffer(row, 4 * self.vocabulary)
        return torch.frombuffer(bytearray(values), dtype=torch.float32)


class _FileSettings(ctypes.Structure):
    """``struct gguf_init_params``."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p)))


def read_control_vector(path: str | Path, hidden_size: int) -> Tensor:
    """Read a control vector with the parser of llama.cpp, by the rules of ``common_control_vector_load``.

    ``direction.K`` fills row K-1, rows that are not there are zeros; see ``common/common.cpp`` of llama.cpp.

    Returns:
        (largest K, d) float32: row i is added to the output of block i + 1.

    Raises:
        ValueError: not a GGUF file, no ``direction.K``, or one of another type, shape or number.
    """
    library = _gguf_functions()
    holder = ctypes.c_void_p()
    file = library.gguf_init_from_file(str(path).encode(), _FileSettings(False, ctypes.pointer(holder)))
    if not file:
        raise ValueError(f"{path}: llama.cpp does not read it; wanted a GGUF control vector")
    try:
        rows: dict[int, Tensor] = {}
        for index in range(library.gguf_get_n_tensors(file)):
            name = library.gguf_get_tensor_name(file, index)
            text = name.decode()
            if not text.startswith(_DIRECTION):
                continue
            number = text.removeprefix(_DIRECTION)
            tensor = library.ggml_get_tensor(holder, name)
            shape = library.ggml_n_dims(tensor), library.ggml_nelements(tensor)
            if not number.isdecimal() or int(number) < 1:
                raise ValueError(f"{path}: {text}: llama.cpp takes direction.1 and up")
            if library.gguf_get_tensor_type(file, index) != _FLOAT32 or shape != (1, hidden_size):
                raise ValueError(
                    f"{path}: {text}: wanted one dimension of {hidden_size} float32, got {shape}"
                )
            values = ctypes.string_at(library.ggml_get_data(tensor), 4 * hidden_size)
            rows[int(number)] = torch.frombuffer(bytearray(values), dtype=torch.float32)
        if not rows:
            raise ValueError(f"{path}: holds no {_DIRECTION}K; wanted a control vector")
        nothing = torch.zeros(hidden_size)
        return torch.stack([rows.get(number, nothing) for number in range(1, max(rows) + 1)])
    finally:
        library.gguf_free(file)
        library.ggml_free(holder)


@functools.cache
def _listener(ffi: Any) -> tuple[Any, deque[str]]:
    """A log that keeps the last errors and prints nothing; llama.cpp holds on to it for good."""
    said: deque[str] = deque(maxlen=2)

    def listen(level: int, text: Any, _: Any) -> None:
        if level == _ERROR:
            said.append(ffi.string(text).decode(errors="replace").strip())

    return ffi.callback("void(enum ggml_log_level, const char *, void *)", listen), said


def _said(ffi: Any) -> str:
    return "; ".join(_listener(ffi)[1]) or "it does not say why"


@functools.cache
def _library() -> tuple[Any, Any, Path]:
    """cffi's declarations, llama.cpp's functions, and the file that has those of GGUF.

    Raises:
        MissingExtraError: not installed, or no library that loads here.
    """
    with needed_for("checking a control vector in llama.cpp"):
        import llama_cpp_py_sync._cffi_bindings as bindings
    folder = Path(bindings.__file__).parent
    try:
        library = bindings.get_lib()
        return (
            bindings.ffi,
            library,
            next(each for each in sorted(folder.iterdir()) if "ggml-base" in each.name),
        )
    except RuntimeError as error:
        found = importlib.util.find_spec("xllamacpp")
        if found is None or not found.submodule_search_locations:
            raise MissingExtraError(
                f"{error}; wanted a newer system, or the wheel xllamacpp of about the same build as "
                "llama-cpp-py-sync, whose library runs on older ones"
            ) from error
    path = next(Path(found.submodule_search_locations[0]).glob("xllamacpp.*"))
    library = bindings.ffi.dlopen(str(path))
    _check_layout(library, path)
    return bindings.ffi, library, path


def _check_layout(library: Any, path: Path) -> None:
    """The structures that are passed by value differ from build to build; their defaults show a mismatch."""
    running, model = library.llama_context_default_params(), library.llama_model_default_params()
    found = (
        running.n_ctx,
        running.n_batch,
        running.n_ubatch,
        running.type_k,
        running.type_v,
        running.op_offload,
    )
    if found != (512, 2048, 512, 1, 1, True) or model.split_mode != 1 or not model.use_extra_bufts:
        raise MissingExtraError(
            f"{path}: is another build of llama.cpp than llama-cpp-py-sync declares; wanted xllamacpp of the same "
            "build, see requirements.lock"
        )


@functools.cache
def _gguf_functions() -> Any:
    library = ctypes.CDLL(str(_library()[2]))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("gguf_init_from_file", pointer, [ctypes.c_char_p, _FileSettings]),
        ("gguf_free", None, [pointer]),
        ("gguf_get_n_tensors", number, [pointer]),
        ("gguf_get_tensor_name", ctypes.c_char_p, [pointer, number]),
        ("gguf_get_tensor_type", ctypes.c_int, [pointer, number]),
        ("ggml_get_tensor", pointer, [pointer, ctypes.c_char_p]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_n_dims", ctypes.c_int, [pointer]),
        ("ggml_nelements", number, [pointer]),
        ("ggml_free", None, [pointer]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
