"""Remove secrets (tokens, passwords, keys) from options, variables, headers and URLs in published text."""

import re
from collections.abc import Callable

MASK = "***"
# Last words of the names of options or keys with a secret.
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
# Names of environment variables and of URL parameters may contain these words anywhere.
_SECRET_VARIABLE_WORDS = _SECRET_WORDS | {"key", "keys", "pass", "sas", "tokens"}
_SECRET_PARAMETER_WORDS = _SECRET_VARIABLE_WORDS | {"accesskeyid", "code", "googleaccessid", "sig", "signature"}
# Values of environment variables that are needed to repeat a command and are not private.
_HARMLESS = re.compile(
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
    r"(?<![\w-])(?P<quote>[\"']?)(?P<name>[A-Za-z][\w-]*)(?P=quote)(?P<between>\s*[=:]\s*)"
    r"(?P<value>\"(?:\\.|[^\"\\])*\"|'[^']*'|[^\s,;&{}\[\]()'\"]+)"
)
_KNOWN_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|wandb_v\d_\w{20,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)\s*"
)


def remove_secrets(text: str) -> str:
    """Remove secrets from a command or a value.

    Options with a secret and environment variables are removed, other secrets are replaced by `***`. Environment
    variables are kept if their names contain no word such as KEY or TOKEN, and their values are numbers or words such
    as `true` and `bf16`.

    Args:
        text: the command or value.
    """
    text = _HEADER.sub(rf"\1\2{MASK}", text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _USER_IN_URL.sub(r"\1", text)
    text = _USER_OF_HOST.sub("", text)
    text = _QUERY.sub(_public_query, text)
    text = _OPTION.sub(lambda found: "" if is_secret_name(found[1]) else found[0], text)
    text = _ASSIGNMENT.sub(_public_assignment(text), text)
    text = _PAIR.sub(_public_pair, text)
    return _KNOWN_TOKEN.sub("", text)


def is_secret_name(name: str) -> bool:
    """Whether the name of an option or key denotes a secret: `hub_token`, `api-key`, `dbPassword`."""
    words = _words(name)
    last = words[-1] if words else ""
    return last in _SECRET_WORDS or last == "key" and (len(words) == 1 or words[-2] in _KEY_OWNERS)


def _words(name: str) -> list[str]:
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return [word for word in re.split(r"[^a-z]+", apart) if word]


def _public_query(found: re.Match) -> str:
    """Return a URL without its query if a parameter is a secret or long enough to be one."""
    for parameter in re.split("[?#&;]", found[2]):
        name, _, value = parameter.partition("=")
        words = _words(name)
        if _SECRET_PARAMETER_WORDS & {*words, "".join(words)} or len(value) >= 20:
            return found[1]
    return found[0]


def _public_assignment(text: str) -> Callable[[re.Match], str]:
    def replace(found: re.Match) -> str:
        exported, name, value, separator = found.groups()
        value = value.strip("'\"")
        if not _SECRET_VARIABLE_WORDS & set(_words(name)) and _HARMLESS.fullmatch(value):
            return found[0]
        if re.search(r"(?:^|\s)--?\w[\w-]*[\s=]+['\"]?$", text[: found.start()]):
            # This is the value of an option, which would otherwise use the next argument as its value.
            return f"{name}={MASK}{separator or ''}" + (" " if found[0][-1:].isspace() else "")
        return "" if exported or not separator else separator.strip() + " "

    return replace


def _public_pair(found: re.Match) -> str:
    quote, name, between, value = found.group("quote", "name", "between", "value")
    if not is_secret_name(name) or value.lower() in ("true", "false", "null", "none"):
        return found[0]
    # Numbers in JSON are kept, such as the index of a token.
    if quote and re.fullmatch(r"-?\d+(\.\d+)?", value):
        return found[0]
    around = value[0] if value[0] in "\"'" else ""
    return f"{quote}{name}{quote}{between}{around}{MASK}{around}"
