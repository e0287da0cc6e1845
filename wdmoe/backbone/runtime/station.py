"""What the base station holds of a model: everything but the experts, which never touch its memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.initialization import no_init_weights

from wdmoe.arrays import Float32Array, Int32Array
from wdmoe.backbone.families import experts_modules, experts_on_meta, is_experts, router_of
from wdmoe.backbone.format.bundle import Bundle, Manifest
from wdmoe.backbone.meta_model import meta_model, read_config
from wdmoe.backbone.perplexity import window_nats
from wdmoe.backbone.runtime.experts_seam import CURRENT_LEDGER
from wdmoe.backbone.runtime.generation import generate
from wdmoe.backbone.runtime.job import Job
from wdmoe.errors import BundleError, ConfigError
from wdmoe.receipt import Ledger
from wdmoe.records import Finished

__all__ = ["Station", "experts_modules", "load_station", "router_of"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A model ready to run, but for its experts: their parameters are on the meta device."""

    model: Any  # a transformers PreTrainedModel, eval mode, no gradients
    tokenizer: Any
    manifest: Manifest
    experts: Mapping[int, nn.Module]  # decoder layer -> experts module
    routers: Mapping[int, nn.Module]  # decoder layer -> router, forward gives (logits, weights, indices)
    device: torch.device
    dtype: torch.dtype
    prefill_chunk: int = 128
    threads: int = 0  # of torch on the model thread; 0: as torch chooses
    kind: str = "transformers"

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """See `Backbone`."""
        if self.threads:
            torch.set_num_threads(self.threads)
        # For good, not per task: grad mode belongs to the thread, and greenlets take turns on it.
        with torch.inference_mode():
            yield

    def begin(self, ledger: Ledger) -> None:
        """See `Backbone`."""
        CURRENT_LEDGER.set(ledger)

    def forget(self) -> None:
        """See `Backbone`. Nothing is kept here."""

    def size_bytes(self, tokens: int) -> int:
        """See `Backbone`. Not known here: transformers takes memory as a request grows."""
        return 0

    def answer(self, job: Job) -> Finished:
        """See `wdmoe.backbone.runtime.generation.generate`."""
        return generate(self.model, self.tokenizer, job, self.prefill_chunk)

    def nats(self, windows: Int32Array, ledger: Ledger) -> Float32Array:
        """See `wdmoe.backbone.perplexity.window_nats`; `ledger` counts what the experts cost."""
        CURRENT_LEDGER.set(ledger)
        found: Float32Array = window_nats(self.model, torch.from_numpy(windows.astype(np.int64))).cpu().numpy()
        return found


def load_station(
    bundle: Bundle, device: str = "auto", dtype: str = "auto", prefill_chunk: int = 128, threads: int = 0
) -> Station:
    """Load a bundle's station part.

    Args:
        bundle: an opened bundle; call `verify` before if its bytes are not trusted.
        device: a torch device, or "auto": CUDA where there is one, else CPU.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on CPU; bfloat16, else float16 on CUDA.
        prefill_chunk: tokens of a prompt that are computed before another request gets its turn.
        threads: of torch while the station works; 0: as torch chooses.
    Raises:
        ConfigError: no such device or dtype.
        BundleError: the station's files do not make up the model.
    """
    place = _device(device)
    kind = _dtype(dtype, place)
    config = read_config(bundle.station_folder)
    skeleton = meta_model(config)
    classes = {type(module) for module in skeleton.modules() if is_experts(module)}
    with experts_on_meta(classes), no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind)
    _load_weights(model, bundle, kind)
    if (bundle.station_folder / "generation_config.json").is_file():  # end-of-text tokens, and more of them
        model.generation_config = _generation_config(bundle)
    model.eval().requires_grad_(False)
    experts = experts_modules(model)
    if tuple(experts) != bundle.manifest.moe_layers:
        raise BundleError(f"{bundle.root}: config.json and manifest.json disagree about the MoE layers")
    _move(model, place)
    return Station(
        model=model,
        tokenizer=_load_tokenizer(bundle),
        manifest=bundle.manifest,
        experts=experts,
        routers={layer: router_of(model, layer) for layer in experts},
        device=place,
        dtype=kind,
        prefill_chunk=prefill_chunk,
        threads=threads,
    )


def _load_weights(model: Any, bundle: Bundle, kind: torch.dtype) -> None:
    """Put the station's tensors in the places of the model's empty ones, and tie what the family ties."""
    wanted = model.state_dict()
    on_meta = {name for name, tensor in wanted.items() if tensor.is_meta}  # the experts'
    loaded: set[str] = set()
    for path in bundle.station_weights():
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if strange := names - (wanted.keys() - on_meta):
                    raise BundleError(f"{path.name} of the station holds {min(strange)!r}, which has no place there")
                tensors = {name: _as_wanted(model, name, file.get_tensor(name), kind) for name in names}
        except SafetensorError as error:
            raise BundleError(f"{path.name} of the station is damaged: {error}") from error
        for name, tensor in tensors.items():
            if tensor.shape != wanted[name].shape:
                raise BundleError(f"{name!r} of the station does not have the shape that config.json wants")
        model.load_state_dict(tensors, strict=False, assign=True)
        loaded |= names
    missing = wanted.keys() - loaded - on_meta
    model.tie_weights(missing_keys=missing, recompute_mapping=False)  # takes out of `missing` what it ties
    if missing:
        raise BundleError(f"{bundle.root}: the station lacks {min(missing)!r}; export it again")


def _as_wanted(model: Any, name: str, tensor: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """A loaded tensor in the dtype it computes in: a copy, so that no file stays mapped."""
    if not tensor.is_floating_point():
        return tensor.clone()
    always = model._keep_in_fp32_modules_strict or ()
    keep = (*always, *(model._keep_in_fp32_modules or ())) if kind == torch.float16 else always
    if any(part in name for part in keep):
        kind = torch.float32
    return tensor.to(kind, copy=True)


def _move(model: Any, place: torch.device) -> None:
    """`model.to(place)` that leaves the experts on the meta device."""
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None and not tensor.is_meta and tensor.device != place:
                    tensors[name] = _moved(tensor, place)
    model.tie_weights(recompute_mapping=False)  # two names of one tensor have become two tensors


def _moved(tensor: torch.Tensor, place: torch.device) -> Any:
    moved = tensor.data.to(place)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise ConfigError(f"device {name!r} cannot be used here; try auto or cpu") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if name not in _DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(_DTYPES)}; got {name!r}")
    return _DTYPES[name]


def _generation_config(bundle: Bundle) -> Any:
    try:
        return transformers.GenerationConfig.from_pretrained(bundle.station_folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise BundleError(f"{bundle.root}: generation_config.json cannot be read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _load_tokenizer(bundle: Bundle) -> Any:
    """A fast transformers tokenizer. Raises BundleError."""
    try:
        return transformers.AutoTokenizer.from_pretrained(
            bundle.station_folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds
        raise BundleError(f"{bundle.root}: the tokenizer cannot be loaded: {' '.join(str(error).split())}") from error
