"""What a module leaves on disk: its tensors, its arguments, and how both come back."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from mmvq.checks import message

_DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only")
_DOWNLOAD_0 = ("proxies", "resume_download")  # passed on by huggingface_hub before 1.0


class Pretrained(nn.Module):
    """A module that can be saved to a folder or to the Hugging Face Hub, and loaded from there.

    A folder holds model.safetensors (`state_dict`) and config.json: the class, the version of its
    state, and the arguments of `__init__`, each read from the attribute of its name at the time of
    saving. Nothing is pickled. An argument that JSON cannot hold (a callable partner, a loss of
    your own, a process group) is listed there, and has to be passed again to `from_pretrained`.

    The names, shapes and meaning of the tensors of `state_dict` are stable: what this version
    saves, every later one loads. `_version` is that of the class's state; `state_dict` carries it
    as every `nn.Module` does, and a file of a newer version is refused.
    """

    _version = 1

    def save_pretrained(self, folder: str | Path, **options: Any) -> str | None:
        """Write the folder (created if missing): tensors, config.json, README.md (a model card).

        Args:
            folder: where.
            **options: of `huggingface_hub.PyTorchModelHubMixin.save_pretrained`, such as
                `push_to_hub=True`.

        Returns:
            None, or with `push_to_hub=True` the address of the commit.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
        """
        saved: str | None = _adapter()(self).save_pretrained(folder, **options)
        return saved

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes.

        Args:
            repo_id: `"user/name"`; created if missing.
            **options: of `huggingface_hub.PyTorchModelHubMixin.push_to_hub`: `private`, `token`,
                `commit_message`, ...

        Returns:
            The address of the commit.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
        """
        address: str = _adapter()(self).push_to_hub(repo_id, **options)
        return address

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """The module that `save_pretrained` or `push_to_hub` left, on the CPU, in eval mode.

        Args:
            source: a folder, or `"user/name"` on the Hub.
            **options: arguments of the class, in place of those saved; or `revision`, `token`,
                `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
            FileNotFoundError: there is no such folder, and no such repo (offline: in the cache); or
                the tensors are not in it.
            ValueError: config.json is missing, of another class or of a newer version; a file is
                damaged; or an argument that config.json could not hold is not passed again.
            RuntimeError: the tensors do not fit the arguments.
        """
        where = f"{cls.__name__}.from_pretrained"
        module: Self = _adapter().load(where, source, build=cls._build, **options)
        return module

    def _argument(self, name: str) -> Any:
        """The present value of an argument of `__init__`."""
        return getattr(self, name)

    def _config(self) -> dict[str, Any]:
        """The content of config.json."""
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
    def _build(cls, config: Any, given: Mapping[str, Any]) -> Self:
        """A module of the saved arguments, those in `given` in place of the saved."""
        where = f"{cls.__name__}.from_pretrained"
        match config:
            case {
                "class": name,
                "version": int(version),
                "arguments": dict(),
                "pass_again": dict(),
            }:
                pass
            case _:
                rule = "there must be a config.json as save_pretrained writes it"
                hint = "check the folder or the repo's name, or save the module again"
                raise ValueError(message(where, rule, hint=hint, config=config))
        if name not in (base.__name__ for base in cls.__mro__):
            hint = f"call from_pretrained of {name}"
            raise ValueError(message(where, "the file is of another class", hint=hint, found=name))
        if version > cls._version:
            raise ValueError(_newer(where, version, cls._version))
        missing = {x: was for x, was in config["pass_again"].items() if x not in given}
        if missing:
            rule = f"config.json cannot hold {', '.join(missing)}"
            hint = f"pass {', '.join(f'{x}=...' for x in missing)} to from_pretrained"
            raise ValueError(message(where, rule, hint=hint, **missing))
        return cls(**{**config["arguments"], **given})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuse, as a whole and where `nn.Module` collects errors, own tensors that do not fit."""
        where = f"{type(self).__name__}.load_state_dict"
        version = local_metadata.get("version") or 1  # a file of bare tensors knows none
        errors = [_newer(where, version, self._version)] if version > self._version else []
        for name, mine in (*self._parameters.items(), *self._buffers.items()):
            found = state_dict.get(prefix + name, mine)  # what is missing is torch's to report
            if mine is None or (isinstance(found, Tensor) and _kind(found) == _kind(mine)):
                continue
            rule = f"{prefix}{name} does not fit this module"
            hint = "build the module with the arguments that the saved one had"
            errors.append(message(where, rule, hint=hint, found=found, expected=mine))
            break  # the others say no more
        error_msgs += errors
        if not errors:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )


def parameters(kind: type) -> list[str]:
    """The arguments of `__init__`; those in `*args` and `**kwargs` are of its base.

    A subclass that fixes one of these itself, and passes `**kwargs` on, cannot be built from them.
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


def _kind(x: Tensor) -> tuple[object, ...]:
    return x.shape, x.is_floating_point()


def _newer(where: str, version: int, known: int) -> str:
    rule = f"the state is of version {version}, this mmvq knows up to {known}"
    return message(where, rule, hint="install the mmvq that saved it", version=version)


@functools.cache
def _adapter() -> Any:
    """The class that lends us huggingface_hub's mixin, imported when it is first needed."""
    try:
        from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
        from huggingface_hub.errors import HFValidationError
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        rule = "the Hub's methods need huggingface_hub and safetensors"
        raise ImportError(
            message("mmvq", rule, hint="pip install 'mmvq[hub]'", missing=error.name)
        ) from error

    class Adapter(PyTorchModelHubMixin, library_name="mmvq"):
        """The mixin saves the tensors of `self.module`; what it loads, we build."""

        def __init__(self, module: Pretrained) -> None:
            self.module = module
            self._hub_mixin_config = module._config()

        @classmethod
        def load(cls, where: str, source: str | Path, **options: Any) -> Any:
            try:
                return cls.from_pretrained(source, **options)
            except (FileNotFoundError, HFValidationError) as error:
                rule = "source must be a folder that save_pretrained wrote, or a repo on the Hub"
                hint = 'check the path: the folder, not a file in it; a repo is named "user/name"'
                raise FileNotFoundError(
                    message(where, rule, hint=hint, source=str(source))
                ) from error
            except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
                rule = "config.json or model.safetensors in source is damaged"
                hint = "copy or download it again"
                came = {"source": str(source), "error": type(error)}
                raise ValueError(message(where, rule, hint=hint, **came)) from error

        @classmethod
        def _from_pretrained(  # type: ignore[override]  # what `load` passes, not all of it
            cls, *, model_id: str, build: Any, config: Any = None, **rest: Any
        ) -> Any:
            options = {name: rest.pop(name) for name in (*_DOWNLOAD, *_DOWNLOAD_0) if name in rest}
            name, folder = constants.SAFETENSORS_SINGLE_FILE, Path(model_id)
            path = folder / name if folder.is_dir() else hf_hub_download(model_id, name, **options)
            module = build(config, rest)
            module.load_state_dict(load_file(path))
            return module.eval()

    return Adapter
