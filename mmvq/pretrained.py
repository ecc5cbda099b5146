"""Saving a module with the arguments of its class, and loading it: folders and the Hub."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mmvq.checks import message
from mmvq.optional import optional_import

_HUB = (
    "mmvq",
    "the Hub's methods need huggingface_hub and safetensors",
    "pip install 'mmvq[hub]'",
)


class Pretrained(nn.Module):
    """A module that can be saved to a folder or to the Hugging Face Hub, and loaded from there.

    A folder holds model.safetensors (the `state_dict`) and config.json: the class, the version of
    its state, and the arguments of `__init__`. Each argument is read from the attribute of its name
    at the time of saving. Nothing is pickled. An argument that JSON cannot hold (a callable
    partner, a custom loss, a process group) is listed in config.json and must be passed to
    `from_pretrained`.

    The names, shapes and meaning of the tensors of `state_dict` are stable: later versions load
    what this version saves. `_version` is the version of the class's state. As in every
    `nn.Module`, `state_dict` carries it; a state of a newer version is refused.
    """

    _version = 1

    def save_pretrained(self, folder: str | Path, **options: Any) -> str | None:
        """Write model.safetensors, config.json and a model card, README.md.

        Args:
            folder: folder to write, created if it does not exist.
            **options: options of `huggingface_hub.PyTorchModelHubMixin.save_pretrained`, such as
                `push_to_hub=True`.

        Returns:
            None, or with `push_to_hub=True` the URL of the commit.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
        """
        saved: str | None = _hub_model(self).save_pretrained(folder, **options)
        return saved

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the files that `save_pretrained` writes.

        Args:
            repo_id: repository `"user/name"`, created if it does not exist.
            **options: options of `huggingface_hub.PyTorchModelHubMixin.push_to_hub`: `private`,
                `token`, `commit_message`, ...

        Returns:
            The URL of the commit.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
        """
        url: str = _hub_model(self).push_to_hub(repo_id, **options)
        return url

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **arguments: Any,
    ) -> Self:
        """Load a module that `save_pretrained` or `push_to_hub` saved, on the CPU, in eval mode.

        Args:
            source: a folder, or a repository `"user/name"` on the Hub.
            revision: branch, tag or commit of the repository.
            token: access token of the Hub.
            cache_dir: folder of the downloaded files.
            force_download: whether to download files that the cache has.
            local_files_only: whether to use the cache alone.
            **arguments: arguments of the class that replace the saved ones.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
            FileNotFoundError: `source` is neither a folder nor a repository (or, offline, not in
                the cache), or has no model.safetensors.
            ValueError: config.json is missing, of another class or of a newer version; a file is
                damaged; an argument is not one of the class; or one that config.json cannot hold is
                not passed.
            RuntimeError: the tensors do not fit the arguments. They are compared before anything of
                the size that the arguments ask for is allocated.
        """
        with optional_import(*_HUB):
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        where, folder = f"{cls.__name__}.from_pretrained", Path(source)
        try:
            if not folder.is_dir():
                folder = Path(
                    snapshot_download(
                        str(source),
                        allow_patterns=["config.json", "model.safetensors"],
                        revision=revision,
                        token=token,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        local_files_only=local_files_only,
                    )
                )
            path = folder / "config.json"
            config = json.loads(path.read_bytes()) if path.exists() else None
            with torch.device("meta"):  # sizes alone, without memory
                outline = cls._checked_build(config, arguments)
            tensors = load_file(folder / "model.safetensors")
            own = outline.state_dict()
            outline.load_state_dict({k: x.to(own.get(k, x).device) for k, x in tensors.items()})
            module = cls._checked_build(config, arguments)
            module.load_state_dict(tensors)
        except (FileNotFoundError, HFValidationError, RepositoryNotFoundError) as error:
            rule = "source must be a folder that save_pretrained wrote, or a repo on the Hub"
            hint = 'check the path: the folder, not a file in it; a repo is named "user/name"'
            raise FileNotFoundError(message(where, rule, hint=hint, source=str(source))) from error
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, SafetensorError) as error:
            rule = "config.json or model.safetensors in source is damaged"
            got = {"source": str(source), "error": type(error)}
            hint = "copy or download it again"
            raise ValueError(message(where, rule, hint=hint, **got)) from error
        return module.eval()

    def _argument(self, name: str) -> Any:
        """Return the present value of an argument of `__init__`."""
        return getattr(self, name)

    def _config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        arguments, again = {}, {}
        for name in parameters(type(self)):
            value = self._argument(name)
            try:
                arguments[name] = json.loads(json.dumps(value))
            except TypeError:
                again[name] = getattr(value, "__qualname__", type(value).__qualname__)
        return {
            "class": type(self).__name__,
            "version": self._version,
            "arguments": arguments,
            "pass_again": again,
        }

    @classmethod
    def _checked_build(cls, config: Any, given: Mapping[str, Any]) -> Self:
        """As `_build`, with one type of error for whatever config.json holds."""
        try:
            return cls._build(config, given)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            where, rule = f"{cls.__name__}.from_pretrained", "the arguments do not fit the class"
            hint = (
                "check what is passed; if that is right, config.json is damaged: download it again"
            )
            raise ValueError(message(where, rule, hint=hint, error=error)) from error

    @classmethod
    def _build(cls, config: Any, given: Mapping[str, Any]) -> Self:
        """Build a module from the saved arguments; those in `given` take precedence."""
        where = f"{cls.__name__}.from_pretrained"
        match config:
            case {
                "class": name,
                "version": int(version),
                "arguments": dict(saved),
                "pass_again": dict(again),
            }:
                pass
            case _:
                rule = "there must be a config.json as save_pretrained writes it"
                hint = "check the folder or the repo's name, or save the module again"
                raise ValueError(message(where, rule, hint=hint, config=config))
        if name not in (base.__name__ for base in cls.__mro__ if _is_saved(base)):
            hint = f"call from_pretrained of {name}"
            raise ValueError(message(where, "the file is of another class", hint=hint, found=name))
        if version > cls._version:
            raise ValueError(_newer(where, version, cls._version))
        missing = {x: kind for x, kind in again.items() if x not in given}
        if missing:
            rule = f"config.json cannot hold {', '.join(missing)}"
            hint = f"pass {', '.join(f'{x}=...' for x in missing)} to from_pretrained"
            raise ValueError(message(where, rule, hint=hint, **missing))
        return cls(**{**saved, **given})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Refuse a state of a newer version, or with a tensor that does not fit, as a whole."""
        where = f"{type(self).__name__}.load_state_dict"
        version = local_metadata.get("version") or 1  # bare tensors have no version
        if version > self._version:
            raise RuntimeError(_newer(where, version, self._version))
        for name, mine in (*self._parameters.items(), *self._buffers.items()):
            found = state_dict.get(prefix + name, mine)  # torch reports what is missing
            if mine is not None and not (isinstance(found, Tensor) and _kind(found) == _kind(mine)):
                rule = f"{prefix}{name} does not fit this module"
                hint = "build the module with the arguments that the saved one had"
                # torch collects the errors of all modules in the last argument
                rest[-1].append(message(where, rule, hint=hint, found=found, expected=mine))
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def parameters(kind: type) -> list[str]:
    """Return the names of the arguments of `__init__`; `*args` and `**kwargs` are its base's.

    A subclass that fixes an argument of its base and passes `**kwargs` on cannot be built from
    them.
    """
    names: dict[str, None] = {}
    for each in kind.__mro__:
        if "__init__" in vars(each):
            _, *found = inspect.signature(vars(each)["__init__"]).parameters.values()
            named = [p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            names |= dict.fromkeys(named)
            if len(named) == len(found):
                break
    return list(names)


def _is_saved(kind: type) -> bool:
    """Whether a class can be that of a config.json."""
    return issubclass(kind, Pretrained) and kind is not Pretrained


def _kind(x: Tensor) -> tuple[object, ...]:
    return x.shape, x.is_floating_point()


def _newer(where: str, version: int, known: int) -> str:
    rule = f"the state is of version {version}, this mmvq knows up to {known}"
    return message(where, rule, hint="install the mmvq that saved it", version=version)


def _hub_model(module: Pretrained) -> Any:
    """Wrap a module in huggingface_hub's mixin, which saves and uploads it."""
    with optional_import(*_HUB):
        from huggingface_hub import PyTorchModelHubMixin
        from safetensors.torch import save_model  # noqa: F401  # which the mixin imports too late

    class HubModel(PyTorchModelHubMixin, library_name="mmvq"):
        def __init__(self) -> None:
            self.module, self._hub_mixin_config = module, module._config()

    return HubModel()
