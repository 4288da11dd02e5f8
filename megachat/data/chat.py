"""Renders conversations as text, and as the chat template that an exported tokenizer carries.

Training and chat must agree on what stands around a turn. Both take it from `ChatConfig`: rows are
rendered by `prompt_of` and `answer_of`, and `chat_template` says the same in Jinja, so that
`tokenizer.apply_chat_template` of the transformers library gives the text of training.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from megachat.config import ConfigModel

ANSWER_SPACE = " "
"""Stands before every answer: a word carries its leading space, as in OPT's vocabulary."""


class Speaker(StrEnum):
    """Who says a turn; the values are the roles of chat templates."""

    SYSTEM = "system"
    HUMAN = "user"
    ASSISTANT = "assistant"


class ChatConfig(ConfigModel):
    r"""What stands before each turn of a conversation.

    Example: `\n\nHuman: Why?\n\nAssistant: Because.`, as in Anthropic's data. It concerns rows that
    are conversations; prompts and answers that come as texts are used as they are.
    """

    system: str = "\n\nSystem: "
    """Before instructions that belong to nobody."""
    human: str = "\n\nHuman: "
    """Before what a person says."""
    assistant: str = "\n\nAssistant:"
    """Before an answer, which brings its own leading space; a prompt ends with it."""

    def before(self, speaker: Speaker) -> str:
        """What stands before the words of a turn."""
        return {
            Speaker.SYSTEM: self.system,
            Speaker.HUMAN: self.human,
            Speaker.ASSISTANT: self.assistant + ANSWER_SPACE,
        }[speaker]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one side says at a time."""

    speaker: Speaker
    text: str


def prompt_of(turns: Sequence[Turn], chat: ChatConfig) -> str:
    """The prompt that asks for the next answer of a conversation."""
    said = "".join(chat.before(turn.speaker) + turn.text for turn in turns)
    return said + chat.assistant


def answer_of(text: str) -> str:
    """An answer as it follows its prompt."""
    return ANSWER_SPACE + text


def chat_template(chat: ChatConfig, *, adds_bos: bool) -> str:
    """The Jinja template that renders messages as training does.

    A conversation that ends with an answer ends with the end-of-sequence token; with
    `add_generation_prompt` it is the prompt for the next answer.

    Args:
        chat: What stands before each turn.
        adds_bos: Whether rows start with a beginning-of-sequence token.
    """
    begin = "{{ bos_token }}" if adds_bos else ""
    # Each branch gives one string, and every tag eats the line breaks around it.
    return (
        begin + "{% for message in messages %}"
        "{% if message['role'] in ['system', 'developer'] %}"
        f"{{{{ {_literal(chat.before(Speaker.SYSTEM))} + message['content'] }}}}"
        "{% elif message['role'] == 'user' %}"
        f"{{{{ {_literal(chat.before(Speaker.HUMAN))} + message['content'] }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {_literal(chat.before(Speaker.ASSISTANT))} + message['content'] }}}}"
        "{% if loop.last %}{{ eos_token }}{% endif %}"
        "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {_literal(chat.assistant)} }}}}{{% endif %}}"
    )


def _literal(text: str) -> str:
    """A string literal of Jinja, which reads JSON's escapes."""
    return json.dumps(text, ensure_ascii=False, allow_nan=False)
