"""Hugging Face's Llama: the names of its tensors, config.json, folders of safetensors, tokenizer.json."""

from model.huggingface.tensors import check_complete, names, pack, shapes, unpack

__all__ = ["check_complete", "names", "pack", "shapes", "unpack"]
