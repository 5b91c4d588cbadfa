"""`ats completion`: what a shell completes, made from the commands' own help."""

import contextlib
import io
import re
import typing
from dataclasses import dataclass
from typing import Literal

import tyro

from ats.experiments.commands.command_line import COMMANDS
from ats.experiments.config import ModelConfig
from ats.experiments.options import parse
from ats.experiments.registry import EXPERIMENTS
from ats.experiments.study.commands import STUDIES

_SECOND = {"train": tuple(EXPERIMENTS), "study": tuple(STUDIES)}
"""Words that must follow a command, and have options of their own."""
_METHODS = typing.get_args(typing.get_type_hints(ModelConfig)["method"])
"""The help of `ats train` shows the options of one."""

_SCRIPT = """\
# Completes the commands of ats, their options and the options' choices.
_ats() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}} $previous" in
{choices}
  esac
  if [ -z "$words" ]; then
    case "$COMP_CWORD ${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
      "1 "*) words="{commands}" ;;
{second}
{options}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _ats ats
"""


@dataclass(frozen=True)
class CompletionOptions:
    """Print a script that lets a shell complete `ats`.

    bash: eval "$(ats completion bash)". zsh: autoload -U +X bashcompinit && bashcompinit, then
    eval "$(ats completion zsh)".
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh"]] = "bash"
    """Whose script; zsh takes bash's by its bashcompinit."""


def run_completion(arguments: list[str]) -> None:
    """`ats completion`."""
    parse(CompletionOptions, "ats completion", arguments)
    print(script(), end="")


def script() -> str:
    """The script for bash, which zsh takes too."""
    choices, options = [], []
    calls = [(name, second) for name in COMMANDS for second in _SECOND.get(name, ("",))]
    for name, second in calls:
        found: dict[str, tuple[str, ...]] = {}
        for words in ([second, "--model.method", method] for method in _METHODS) if name == "train" else ([second],):
            found |= options_of([name, *filter(None, words)])
        pattern = f'"{name} {second} ' if second else f'"{name} "*" '
        choices += [f'    {pattern}{option}") words="{" ".join(words)}" ;;' for option, words in found.items() if words]
        place = f'*" {name} {second}"' if second else f'*" {name} "*'
        options.append(f'      {place}) words="{" ".join(found)}" ;;')
    return _SCRIPT.format(
        commands=" ".join(COMMANDS),
        choices="\n".join(choices),
        second="\n".join(f'      "2 {name} "*) words="{" ".join(words)}" ;;' for name, words in _SECOND.items()),
        options="\n".join(options),
    )


def options_of(words: list[str]) -> dict[str, tuple[str, ...]]:
    """The options that a command's help lists, with their choices where they have some."""
    name, *rest = words
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        COMMANDS[name].load()([*rest, "--help"])
    found: dict[str, tuple[str, ...]] = {}
    for line in shown.getvalue().splitlines():
        listed = re.match(r"[│ ]*(-h, )?(?P<options>--[a-z][\w.-]*(, --[a-z][\w.-]*)*)(?P<takes>.*)", line)
        if listed:
            choices = re.match(r" \{([\w.,-]+)\}", listed["takes"])
            for option in re.findall(r"--[\w.-]+", listed["options"]):
                found[option] = tuple(word for word in choices[1].split(",") if word != "None") if choices else ()
    return found
