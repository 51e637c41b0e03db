"""Upload of models to the Hub, with checks that can run before training."""

import json
import re
import shlex
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants

# HTTPError is that of the HTTP library of huggingface_hub, for failed connections.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, filter_repo_objects, get_session
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .card_metadata import insert_license, read_card
from .card_redaction import redact_json
from .example_image import EXAMPLE_NAME, add_example_image, open_example_image
from .model_card import build_model_card

# An output folder also contains checkpoints, optimizer states and files with local paths.
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
        EXAMPLE_NAME,
    ],
    # `*` matches slashes too.
    "ignore_patterns": ["*/*"],
}
PROCESSOR_NAMES = ("preprocessor_config.json", "processor_config.json")


class HubUploadError(ValueError):
    """Raised when the Hub rejects an upload or the upload fails. Local files are unchanged."""


def create_and_check_repo(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Create a model repository if it does not exist, and check write access.

    Args:
        repo_id: `user/name`, or `name` for the user of the token.
        token: Token for the Hub. None: that of `hf auth login` or of the environment variable HF_TOKEN.
        private: Make a new repository private.

    Returns:
        The full name, `user/name`.

    Raises:
        HubUploadError: Nobody is logged in, the token is invalid or has no write access, the name is invalid, or the
            Hub cannot be reached.
    """
    api = HfApi(token=token)
    try:
        full_name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(full_name, write=True)
    except (HTTPError, OSError, ValueError) as error:
        raise HubUploadError(format_hub_error(error, api, repo_id)) from error
    return full_name


def upload_model_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload model",
    license: str | None = None,
    example_image: str | Path | None = None,
    blocking: bool = True,
) -> CommitInfo | Future[CommitInfo]:
    """Upload the exported model in a folder. Only files that match `UPLOAD_PATTERNS` are uploaded.

    The repository name in the model card is updated first, see `update_card_repo_id`. Local paths in JSON files are
    removed, see `commit_files`. The repository changes by one commit at the end, so a failed upload can be repeated.
    Files that are already uploaded are not sent again.

    Args:
        folder: Output folder of a training run or of `convert_weights`, with config, safetensors and image processor.
        repo_id: `user/name`, or `name` for the user of the token.
        token: Token for the Hub. None: that of `hf auth login` or of the environment variable HF_TOKEN.
        private: Make a new repository private.
        revision: Branch to upload to. None: `main`.
        message: Commit message.
        license: License of the weights for the model card. None keeps that of the card.
        example_image: Image file for the model card, which shows it with the model's prediction, see
            `hf_tokenmixup.hub.example_image.add_example_image`. None keeps that of the card.
        blocking: False uploads in the background and returns a future, which raises the errors of huggingface_hub.

    Returns:
        The commit, or a future of it.

    Raises:
        ValueError: The folder does not contain an exported model, the license is invalid, or the example image cannot
            be read.
        HubUploadError: There is no write access, or the upload failed.
    """
    validate_model_folder(folder)
    folder = Path(folder)
    if license is not None:
        validate_license(license)
    image = None if example_image is None else open_example_image(example_image)
    repo_id = create_and_check_repo(repo_id, token=token, private=private)
    if license is not None:
        validate_license(license, on_hub=True, token=token)
    update_card_repo_id(folder, repo_id, license)
    if image is not None:
        add_example_image(folder, image)
    api = HfApi(token=token)
    upload = partial(commit_files, api, folder, repo_id, message=message, revision=revision, **UPLOAD_PATTERNS)
    if not blocking:
        return api.run_as_future(upload)
    try:
        return upload()
    # huggingface_hub raises RuntimeError if an upload to the storage fails.
    except (HTTPError, OSError, RuntimeError) as error:
        branch = "" if revision is None else f" --revision {shlex.quote(revision)}"
        raise HubUploadError(
            f"{format_hub_error(error, api, repo_id)} The local model in {folder} is complete and the repository is "
            f"unchanged. Repeat the upload: `hf-tokenmixup publish {shlex.quote(str(folder))} {repo_id}{branch}`."
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
    """Upload files of a folder in one commit. Local paths are removed from JSON files.

    Args:
        api: Client with the token.
        folder: Folder, whose files do not change.
        repo_id: Name of the repository.
        message: Commit message.
        revision: Branch. None: `main`.
        path_in_repo: Folder in the repository.
        allow_patterns: Patterns of paths within `folder` to upload. None: all.
        ignore_patterns: Patterns of paths to exclude.
        changed: Contents by path within `folder` that replace those on disk.
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


def validate_license(license: str, *, on_hub: bool = False, token: str | None = None) -> None:
    """Check a license identifier.

    Args:
        license: License identifier of the Hub.
        on_hub: Also ask the Hub, which knows all identifiers. If it does not answer, only the form is checked.
        token: Token for the Hub.

    Raises:
        ValueError: The identifier is invalid.
    """
    if not re.fullmatch(r"[a-z0-9]+(?:[.+-]+[a-z0-9]+)*\+*", license) or license in ("none", "null", "no", "yes"):
        raise ValueError(
            "license must be a lowercase identifier of the Hub, such as apache-2.0, mit, cc-by-nc-4.0 or other, got "
            f"{license!r}."
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
        raise ValueError(f"The Hub does not know the license {license!r}: {' '.join(map(str, errors))}")


def validate_model_folder(folder: str | Path) -> None:
    """Check that a folder contains an exported model and an image processor.

    Raises:
        ValueError: The model or the image processor is missing, or the folder is a training checkpoint.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} contains no model: {CONFIG_NAME} is missing. Choose the output folder of a run.")
    names = _tensor_names(folder)
    if any(".scorenet." in name for name in names):
        raise ValueError(
            f"{folder} is a training checkpoint: it contains ScoreNet. Use its parent folder, or export the model "
            "with `model.to_plain_model().save_pretrained(...)`."
        )
    config = _read_json(folder / CONFIG_NAME)
    if config.get("model_type") not in CONFIG_MAPPING_NAMES and not config.get("auto_map"):
        raise ValueError(
            f"transformers has no model type {config.get('model_type')!r}, and {folder} does not contain its modeling "
            "code. Load the model with `load_classifier(folder, plain=True)` and save it with `save_pretrained`."
        )
    if not any((folder / name).is_file() for name in PROCESSOR_NAMES):
        raise ValueError(
            f"{folder} contains no image processor, which the model needs. Add it with "
            "`image_processor.save_pretrained(...)`."
        )


def update_card_repo_id(folder: Path, repo_id: str, license: str | None = None) -> None:
    """Replace the model name in the card of a folder: in the title, the metadata, and the snippets and commands.

    A run without upload writes its output folder there. If the folder has no card, a new one is written.

    Args:
        folder: Folder of the model.
        repo_id: Name of the repository.
        license: License that replaces that of the card.
    """
    path = folder / "README.md"
    if not path.is_file():
        build_model_card(AutoConfig.from_pretrained(folder), repo_id, license=license).save(path)
        return
    card = read_card(path)
    if license is not None:
        card = insert_license(card, license)
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


def format_hub_error(error: Exception, api: HfApi, repo_id: str) -> str:
    """Format an error of huggingface_hub with a hint. The text contains no token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it."
    if status == 401:
        has_token = api.token or constants.HF_TOKEN_PATH and Path(constants.HF_TOKEN_PATH).is_file()
        problem = "The Hub rejected the token" if has_token else "Not logged in to the Hub"
        return (
            f"{problem}. Run `hf auth login`, or set the environment variable HF_TOKEN to a token with write "
            "permission."
        )
    if status == 403:
        return (
            f"No write access to {repo_id} on the Hub{_format_user(api)}. Use a repository of your own, USER/NAME, or "
            "a token with write permission."
        )
    if isinstance(error, HfHubHTTPError):
        return f"The Hub rejected {repo_id}: {error.server_message or _first_line(error)}."
    if isinstance(error, ValueError):
        reason = _first_line(error).removesuffix(" Use `repo_type` argument if needed.")
        return f"{repo_id!r} is not a valid repository name: {reason} Use USER/NAME."
    return f"The connection to the Hub at {api.endpoint} failed ({type(error).__name__}: {_first_line(error)})."


def _format_user(api: HfApi) -> str:
    try:
        return f", logged in as {api.whoami()['name']}"
    except (HTTPError, OSError, ValueError):
        return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def _tensor_names(folder: Path) -> list[str]:
    """List the names of all tensors in the safetensors files of a folder."""
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        weights = _read_json(index).get("weight_map")
        if not isinstance(weights, dict):
            raise ValueError(f"{index} must have a weight_map, as save_pretrained writes it. Copy or save it again.")
        missing = sorted({name for name in weights.values() if not (folder / name).is_file()})
        if missing:
            raise ValueError(
                f"{folder} does not contain {', '.join(missing)}, listed in {index.name}. Copy or save them again."
            )
        return list(weights)
    if not single.is_file():
        raise ValueError(f"{folder} contains no weights: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}.")
    try:
        with safe_open(single, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{single} is corrupted or truncated ({error}). Copy or save it again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Copy or save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(content).__name__}. Copy or save it again.")
    return content
