"""The modules of the cross-modal generalisation example."""

from importlib.util import find_spec

_MISSING = [name for name in ("safetensors", "sklearn", "tqdm") if find_spec(name) is None]
if _MISSING:
    raise ImportError(
        f"cmg: the example needs {', '.join(_MISSING)}. Hint: pip install 'mmvq[examples]'."
    )
