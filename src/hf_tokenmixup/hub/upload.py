"""What goes up to the Hub, and whether it may: asked before a training rather than after it."""

import json
import re
import shlex
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants

# HTTPError is that of the client's HTTP library, for a connection that cannot be made or breaks.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, filter_repo_objects, get_session
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .card_redaction import redact_json
from .eval_results import read_card, with_license
from .model_card import build_model_card

# An allow-list: an output folder also holds checkpoints, optimizer states and files that name local paths.
UPLOAD_PATTERNS = {
    "allow_patterns": [
        "README.md",
        CONFIG_NAME,
        "model*.safetensors",
        SAFE_WEIGHTS_INDEX_NAME,
        "adapter_config.json",
        "adapter_model.safetensors",
        "*processor_config.json",
        "configuration_*.py",
        "modeling_*.py",
        "all_results.json",
        "training_log.jsonl",
        "training_curves.png",
    ],
    # `*` stands for slashes too.
    "ignore_patterns": ["*/*"],
}
PROCESSOR_NAMES = ("preprocessor_config.json", "processor_config.json")


class HubUploadError(ValueError):
    """The Hub does not take it; the message says why and what to do. Nothing on the disk has changed."""


def create_and_check_repo(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Create a model repository where there is none, and make sure that one may write to it.

    Args:
        repo_id: `user/name`, or `name` alone for the user of the token.
        token: default: that of `hf auth login` or of the environment variable HF_TOKEN.
        private: whether a new repository is private.

    Returns:
        The full name, `user/name`.

    Raises:
        HubUploadError: nobody is logged in, the token is not known or may not write there, the name is none that
            the Hub takes, or the Hub cannot be reached; says what to do.
    """
    api = HfApi(token=token)
    try:
        claimed = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(claimed, write=True)
    except (HTTPError, OSError, ValueError) as error:
        raise HubUploadError(explain(error, api, repo_id)) from error
    return claimed


def upload_model_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload model",
    license: str | None = None,
    blocking: bool = True,
) -> CommitInfo | Future[CommitInfo]:
    """Upload the published model that lies in a folder, and nothing else of it.

    The model card is addressed to the repository first, see :func:`update_card_repo_id`. All of it can be repeated:
    what went up before an interruption is not sent again, and the repository changes only by one commit at the very
    end. Folders of this machine that a JSON file names are not published, see :func:`commit_files`.

    Args:
        folder: with config, safetensors and image processor, as a training or `convert_weights.py` leaves it.
        repo_id, token, private: as in :func:`create_and_check_repo`.
        revision: branch to upload to, default `main`.
        message: of the commit.
        license: of the weights, put into the card; None leaves the card's own.
        blocking: False uploads in the background and returns a future, from which errors come as the client has them.

    Raises:
        ValueError: the folder holds no published model.
        HubUploadError: one may not write there, or the upload breaks off.
    """
    validate_model_folder(folder)
    folder = Path(folder)
    if license is not None:
        check_license(license)
    repo_id = create_and_check_repo(repo_id, token=token, private=private)
    if license is not None:
        check_license(license, on_hub=True, token=token)
    update_card_repo_id(folder, repo_id, license)
    api = HfApi(token=token)
    upload = partial(commit_files, api, folder, repo_id, message=message, revision=revision, **UPLOAD_PATTERNS)
    if not blocking:
        return api.run_as_future(upload)
    try:
        return upload()
    # RuntimeError: the client tells so of an upload to the storage that broke off.
    except (HTTPError, OSError, RuntimeError) as error:
        branch = "" if revision is None else f" --revision {shlex.quote(revision)}"
        raise HubUploadError(
            f"{explain(error, api, repo_id)} The model in {folder} is complete and the repository has no part of it. "
            f"Repeat the upload: `hf-tokenmixup publish {shlex.quote(str(folder))} {repo_id}{branch}`."
        ) from error


def commit_files(
    api: HfApi,
    folder: str | Path,
    repo_id: str,
    *,
    message: str,
    revision: str | None = None,
    path_in_repo: str = "",
    allow_patterns: list[str] | None = None,
    ignore_patterns: list[str] | None = None,
    changed: Mapping[str, bytes] | None = None,
) -> CommitInfo:
    """Upload files of a folder in one commit, JSON files without folders of this machine.

    Args:
        api: With the token.
        folder: The files on the disk stay as they are.
        repo_id: Name of the repository.
        message: Of the commit.
        revision: Branch, default `main`.
        path_in_repo: Folder in the repository.
        allow_patterns: Which paths within `folder` to upload; None: all.
        ignore_patterns: Which of these not to upload.
        changed: Contents to upload instead of those on the disk, by path within `folder`.
    """
    folder = Path(folder)
    paths = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    paths = filter_repo_objects(paths, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
    operations = []
    for path in paths:
        content = (changed or {}).get(path)
        if content is None:
            content = redact_json(folder / path)
        target = f"{path_in_repo}/{path}" if path_in_repo else path
        operations.append(CommitOperationAdd(target, folder / path if content is None else content))
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision)


def check_license(license: str, *, on_hub: bool = False, token: str | None = None) -> None:
    """Check an identifier of a license.

    Args:
        license: As the Hub names it.
        on_hub: Ask the Hub, which knows all identifiers; without an answer from it any that looks like one is taken.
        token: For the Hub.

    Raises:
        ValueError: It is none.
    """
    if not re.fullmatch(r"[a-z0-9]+(?:[.+-]+[a-z0-9]+)*\+*", license) or license in ("none", "null", "no", "yes"):
        raise ValueError(
            f"license must be an identifier of the Hub in lower case, such as apache-2.0, mit, cc-by-nc-4.0 or other; "
            f"got {license!r}."
        )
    if not on_hub:
        return
    url = f"{HfApi().endpoint}/api/validate-yaml"
    card = {"repoType": "model", "content": f"---\nlicense: {json.dumps(license)}\n---\n"}
    try:
        answer = get_session().post(url, json=card, headers=build_hf_headers(token=token))
        errors = [error["message"] for error in answer.json()["errors"]] if answer.status_code == 400 else []
    except (HTTPError, OSError, ValueError, LookupError, TypeError):
        return
    if errors:
        raise ValueError(f"The Hub has no license {license!r}: {' '.join(map(str, errors))}")


def validate_model_folder(folder: str | Path) -> None:
    """
    Raises:
        ValueError: `folder` holds no model in the published form, or no image processor.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} holds no model: expected a folder with {CONFIG_NAME} in it.")
    names = _tensor_names(folder)
    if any(".scorenet." in name for name in names):
        raise ValueError(
            f"{folder} is a checkpoint in training, ScoreNet included. The published form lies in the output folder "
            "above it; or make it: `model.published().save_pretrained(...)`."
        )
    config = _read_json(folder / CONFIG_NAME)
    if config.get("model_type") not in CONFIG_MAPPING_NAMES and not config.get("auto_map"):
        raise ValueError(
            f"Transformers has no model type {config.get('model_type')!r}, and its code does not lie in {folder}: "
            "open the model with `load_classifier(folder, plain=True)` and save it there again with `save_pretrained`."
        )
    if not any((folder / name).is_file() for name in PROCESSOR_NAMES):
        raise ValueError(
            f"{folder} holds no image processor, without which nobody can use the model: save it there with "
            "`image_processor.save_pretrained(...)`."
        )


def update_card_repo_id(folder: Path, repo_id: str, license: str | None = None) -> None:
    """Have the card in `folder` name `repo_id` where it says how to open and to evaluate the model.

    A training that did not upload writes the folder there. Where there is no card, one is made. `license` replaces the
    card's own.
    """
    path = folder / "README.md"
    if not path.is_file():
        build_model_card(AutoConfig.from_pretrained(folder), repo_id, license=license).save(path)
        return
    card = read_card(path)
    if license is not None:
        card = with_license(card, license)
        path.write_bytes(card.encode())
    found = re.search(r'pipeline\("image-classification", model=("(?:[^"\\]|\\.)+")', card)
    if not found or json.loads(found[1]) == repo_id:
        return
    old = json.loads(found[1])
    for before, after in (
        (found[1], json.dumps(repo_id)),
        (f"scripts/evaluate.py {shlex.quote(old)}", f"scripts/evaluate.py {repo_id}"),
        (f"\n# {PurePath(old).name}\n", f"\n# {PurePath(repo_id).name}\n"),
        (f"\n- name: {PurePath(old).name}\n", f"\n- name: {PurePath(repo_id).name}\n"),
    ):
        card = card.replace(before, after)
    path.write_bytes(card.encode())


def explain(error: Exception, api: HfApi, repo_id: str) -> str:
    """What went wrong between here and the Hub and what to do about it, without any token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it."
    if status == 401:
        known = api.token or constants.HF_TOKEN_PATH and Path(constants.HF_TOKEN_PATH).is_file()
        trouble = "does not accept the token" if known else "does not know who you are"
        return (
            f"The Hub {trouble}: log in with `hf auth login`, or set the environment variable HF_TOKEN to a token "
            "with write permission."
        )
    if status == 403:
        return (
            f"You may not write to {repo_id} on the Hub{_format_user(api)}. Name a repository of your own, USER/NAME, "
            "or use a token with write permission."
        )
    if isinstance(error, HfHubHTTPError):
        return f"The Hub refused {repo_id}: {error.server_message or _first_line(error)}."
    if isinstance(error, ValueError):
        reason = _first_line(error).removesuffix(" Use `repo_type` argument if needed.")
        return f"{repo_id!r} is no name for a repository: {reason} Name it USER/NAME."
    return f"The connection to the Hub at {api.endpoint} failed ({type(error).__name__}: {_first_line(error)})."


def _format_user(api: HfApi) -> str:
    try:
        return f", signed in as {api.whoami()['name']}"
    except (HTTPError, OSError, ValueError):
        return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def _tensor_names(folder: Path) -> list[str]:
    """Names of all tensors in the safetensors files of `folder`."""
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        weights = _read_json(index).get("weight_map")
        if not isinstance(weights, dict):
            raise ValueError(f"{index} must have a weight_map, as save_pretrained writes it. Copy it again.")
        missing = sorted({name for name in weights.values() if not (folder / name).is_file()})
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which its {index.name} names.")
        return list(weights)
    if not single.is_file():
        raise ValueError(f"{folder} holds no weights: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}.")
    try:
        with safe_open(single, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{single} is damaged or incomplete ({error}). Copy or save it again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Copy or save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(content).__name__}. Copy or save it again.")
    return content
