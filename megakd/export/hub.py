"""`--push ORG/NAME`: an export as a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check_name(name: str) -> None:
    """Raises ValueError for what the hub takes for no repository."""
    if not _NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith((".git", ".ipynb", ".", "-")):
        raise ValueError(f"--push {name}: give ORG/NAME, of letters, digits, '-', '_' and '.', such as my-lab/small-clip")


def listed(folder: Path, name: str) -> list[str]:
    """For people: the files that a push sends, with their sizes."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    widest = max(map(len, files))
    rows = [f"  {path:<{widest}}  {size:>14,} bytes" for path, size in files.items()]
    return [f"--dry_run: {len(files)} files, {sum(files.values()):,} bytes, would be pushed to {name}; nothing was sent", *rows]


def push(folder: Path, name: str) -> str:
    """Send the files to the repository, made private where it is not there yet, in one commit. Gives a line for people.

    Raises ValueError, and the folder stays, where the hub cannot be reached or refuses.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="megakd export")
    except Exception as error:  # its client's classes, those of its HTTP library, and the socket's
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"--push {name}: the hub did not take it ({type(error).__name__}: {reason[:300]}); {folder} is written and stays. With a "
            f"network and a token that may write there (`hf auth login`, or HF_TOKEN) `hf upload {name} {folder}` sends the same files"
        ) from error
    return f"pushed to {name}, {done.oid[:10]}: a new repository is private until you make it public"
