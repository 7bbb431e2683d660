"""Converts a GGUF file to a model folder: `python -m serving.gguf_convert FILE.gguf FOLDER`.

A program of its own, so that the command that asks for it needs neither torch nor its memory. Writes one line on
standard output per stage; whatever goes wrong ends it with a traceback on standard error and a status other than 0.
Makes float32 safetensors, never a quantised model, and needs no network.
"""

import sys
from pathlib import Path


def convert(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer and float32 weights of `gguf` to `folder`, which exists. About 30 s for 135M weights."""
    _announce("loading torch and transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _announce("converting the tokenizer")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    _announce("unpacking the weights to float32")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    _announce("writing safetensors")
    model.save_pretrained(folder)
    _check(folder)


def _check(folder: Path) -> None:
    """The folder must load as a plain float32 model; a library that changes its mind here must not go unnoticed."""
    from safetensors import safe_open
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise RuntimeError("the converted config still speaks of quantisation")
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 - not a dict
        if dtypes != {"F32"}:
            raise RuntimeError(f"{path.name} should hold float32 weights alone, not {sorted(dtypes)}")


def _announce(stage: str) -> None:
    """Fails once the reader is gone, and so ends a conversion that nobody waits for any more."""
    sys.stdout.write(f"{stage}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
