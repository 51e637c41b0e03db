"""Remove secrets (tokens, passwords, keys) from options, variables, headers and URLs in published text."""

import re
from collections.abc import Callable

MASK = "***"
# An option or key whose name ends with one of these words has a secret.
_SECRET_WORDS = {
    "auth",
    "authorization",
    "apikey",
    "cookie",
    "credential",
    "credentials",
    "passphrase",
    "passwd",
    "password",
    "pat",
    "pwd",
    "secret",
    "secrets",
    "token",
}
_KEY_OWNERS = {"access", "account", "api", "auth", "encryption", "private", "secret", "service", "storage"}
# An environment variable or URL parameter whose name contains one of these words has a secret.
_SECRET_VARIABLE_WORDS = _SECRET_WORDS | {"key", "keys", "pass", "sas", "tokens"}
_SECRET_PARAMETER_WORDS = _SECRET_VARIABLE_WORDS | {"accesskeyid", "code", "googleaccessid", "sig", "signature"}
# Values of environment variables that are public and needed to repeat a command.
_PUBLIC_VALUE = re.compile(
    r"\d{1,6}(?:,\d{1,6})*|\d{1,6}\.\d{1,6}|true|false|on|off|yes|no|none|auto|offline|online|disabled"
    r"|bf16|fp16|fp32|fp8|nccl|gloo|cpu|cuda|mps",
    re.IGNORECASE,
)

_SHELL_VALUE = r"(?:'[^']*'|\"(?:\\.|[^\"\\])*\"|\$\([^)]*\)|`[^`]*`|\\.|[^\s'\"`;&|<>\\])"
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization|(?:set-)?cookie|x-[\w-]*(?:key|token|auth)[\w-]*)(\s*:\s*)[^'\"\r\n]+", re.IGNORECASE
)
_BEARER = re.compile(r"\b(bearer)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
# A password may contain any character: it extends from a colon that begins no port to the last @.
_USER_IN_URL = re.compile(r"([A-Za-z][\w+.-]*://)(?:[^\s/:@'\"]*:(?!\d+(?:[/?#\s]|$))[^\s'\"]*@|[^\s/?#'\"@]*@)")
_USER_OF_HOST = re.compile(r"(?<![\w/.:@-])[\w.%+-]+:[^\s/@:'\",]+@(?=[\w-]+\.|localhost|\[)")
_QUERY = re.compile(r"([A-Za-z][\w+.-]*://[^\s'\"?#<>]*)([?#][^\s'\"<>]*)")
_OPTION = re.compile(rf"(?<![\w-])--?([A-Za-z][\w-]*)(?:=|\s+(?!--)){_SHELL_VALUE}+\s*")
_ASSIGNMENT = re.compile(
    rf"(?<![^\s;&|(\"'`])(export\s+|setx?\s+|\$env:)?([A-Z][A-Z0-9_]*)=({_SHELL_VALUE}*)(\s*(?:;|&&))?\s*"
)
_PAIR = re.compile(
    r"(?<![\w-])(?P<quote>[\"']?)(?P<name>[A-Za-z][\w-]*)(?P=quote)(?P<separator>\s*[=:]\s*)"
    r"(?P<value>\"(?:\\.|[^\"\\])*\"|'[^']*'|[^\s,;&{}\[\]()'\"]+)"
)
_KNOWN_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|wandb_v\d_\w{20,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)\s*"
)


def remove_secrets(text: str) -> str:
    """Remove secrets from a command or a value.

    Options with a secret and environment variables are removed, other secrets are replaced by `***`. An environment
    variable is not removed if its name contains no word such as KEY or TOKEN, and its value is a number or a word such
    as `true` or `bf16`.

    Args:
        text: Command or value.
    """
    text = _HEADER.sub(rf"\1\2{MASK}", text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _USER_IN_URL.sub(r"\1", text)
    text = _USER_OF_HOST.sub("", text)
    text = _QUERY.sub(_public_query, text)
    text = _OPTION.sub(lambda match: "" if is_secret_name(match[1]) else match[0], text)
    text = _ASSIGNMENT.sub(_public_assignment(text), text)
    text = _PAIR.sub(_public_pair, text)
    return _KNOWN_TOKEN.sub("", text)


def is_secret_name(name: str) -> bool:
    """Return whether the name of an option or key denotes a secret, such as `hub_token`, `api-key` or `dbPassword`."""
    words = _split_words(name)
    last = words[-1] if words else ""
    return last in _SECRET_WORDS or last == "key" and (len(words) == 1 or words[-2] in _KEY_OWNERS)


def _split_words(name: str) -> list[str]:
    snake_case = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return [word for word in re.split(r"[^a-z]+", snake_case) if word]


def _public_query(match: re.Match) -> str:
    """Remove the query of a URL if a parameter is a secret, or long enough to be one."""
    for parameter in re.split("[?#&;]", match[2]):
        name, _, value = parameter.partition("=")
        words = _split_words(name)
        if _SECRET_PARAMETER_WORDS & {*words, "".join(words)} or len(value) >= 20:
            return match[1]
    return match[0]


def _public_assignment(text: str) -> Callable[[re.Match], str]:
    """Return a function that removes or masks an assignment of an environment variable in the text."""

    def replace(match: re.Match) -> str:
        export, name, value, separator = match.groups()
        value = value.strip("'\"")
        if not _SECRET_VARIABLE_WORDS & set(_split_words(name)) and _PUBLIC_VALUE.fullmatch(value):
            return match[0]
        if re.search(r"(?:^|\s)--?\w[\w-]*[\s=]+['\"]?$", text[: match.start()]):
            # The assignment is the value of an option. Without it, the next argument would become the value.
            return f"{name}={MASK}{separator or ''}" + (" " if match[0][-1:].isspace() else "")
        return "" if export or not separator else separator.strip() + " "

    return replace


def _public_pair(match: re.Match) -> str:
    """Mask the value of a key with a secret."""
    quote, name, separator, value = match.group("quote", "name", "separator", "value")
    if not is_secret_name(name) or value.lower() in ("true", "false", "null", "none"):
        return match[0]
    # A number in JSON is no secret, such as the index of a token.
    if quote and re.fullmatch(r"-?\d+(\.\d+)?", value):
        return match[0]
    value_quote = value[0] if value[0] in "\"'" else ""
    return f"{quote}{name}{quote}{separator}{value_quote}{MASK}{value_quote}"
