"""TinyStories (arXiv 2305.07759), the GPT-4 part of version 2: downloaded once, with its own validation file."""

from __future__ import annotations

from pathlib import Path

from training.errors import UserError


def tinystories_files(download_dir: Path) -> list[Path]:
    """The file to train on and the one to validate on. UserError where they are not there and can't be downloaded."""
    return [_download(f"TinyStoriesV2-GPT4-{split}.txt", download_dir) for split in ("train", "valid")]


def _download(filename: str, download_dir: Path) -> Path:
    file = download_dir / filename
    if file.exists():  # a download in progress has another name
        return file
    try:
        import huggingface_hub

        return Path(
            huggingface_hub.hf_hub_download(
                repo_id="roneneldan/TinyStories", filename=filename, repo_type="dataset", local_dir=download_dir
            )
        )
    except Exception as error:  # which classes it raises depends on its version and on its HTTP library's
        raise UserError(f"--data tinystories: {filename} can't be downloaded to {download_dir}: {error}") from error
