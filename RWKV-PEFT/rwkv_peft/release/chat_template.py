"""The layout of chats in training (data/turns.py, data/tools.py) as the Jinja template of a model's folder or GGUF.

It differs from the layout of rows in three things: a blank line ends the last turn, too; arguments of a call that are
given as text stay as they are spelled; results of tools stay in the order in which they are given. What counts in the
loss is marked as generated: an answer, the blank line behind it, and the name of the next speaker. `think`, "on" or
"off", opens the next answer as --think does.
"""

import re

from ..data.tools import ASKED
from ..data.turns import CALLS, OPENINGS, SPEAKERS

CLEANING = (  # as data/turns.cleaned
    "{%- if name != 'Assistant' -%}"
    r"{%- set lines = turn.words.replace('\r\n', '\n').split('\n') -%}"
    "{%- set turn.words = '' -%}"
    "{%- for line in lines if line -%}"
    r"{%- set turn.words = turn.words + ('\n' if turn.words else '') + line -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
)
CHAT_TEMPLATE = (
    f"{{%- set names = { {role: name for role, name in SPEAKERS.items() if role not in CALLS} } -%}}"
    "{%- set told = namespace(tools='') -%}"
    "{%- for tool in tools or [] -%}"
    "{%- set told.tools = told.tools + (tool['function'] if tool['function'] is defined else tool)|tojson + '\n' -%}"
    "{%- endfor -%}"
    "{%- if tools -%}"
    f"{{%- set told.tools = '<tools>\n' + told.tools + '</tools>\n{ASKED}' -%}}"
    "{%- if names[messages[0]['role']|lower] != 'System' -%}{{- 'System: ' + told.tools + '\n\n' -}}{%- endif -%}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- set name = names[message['role']|lower] or raise_exception('the role ' + message['role'] + ' has no name') -%}"
    "{%- set content = message['content'] or '' -%}"
    "{%- set turn = namespace(words=content if content is string else '') -%}"
    "{%- for part in ([] if content is string else content) -%}"
    "{%- if part['text'] is not string -%}{{- raise_exception('a part of a content is no text') -}}{%- endif -%}"
    "{%- set turn.words = turn.words + part['text'] -%}"
    "{%- endfor -%}"
    f"{CLEANING}"
    "{%- set turn.words = turn.words|trim -%}"
    "{%- for called in message['tool_calls'] or [] -%}"
    "{%- set call = called['function'] if called['function'] is defined else called -%}"
    "{%- set given = call['arguments'] or {} -%}"
    "{%- set given = given if given is string else given|tojson -%}"
    "{%- set call = '{\"name\": ' + call['name']|tojson + ', \"arguments\": ' + given + '}' -%}"
    "{%- set turn.words = turn.words + ('\n' if turn.words else '') + '<tool_call>\n' + call + '\n</tool_call>' -%}"
    "{%- endfor -%}"
    "{%- if loop.first and name == 'System' and tools -%}"
    "{%- set turn.words = turn.words + ('\n' if turn.words else '') + told.tools -%}"
    "{%- endif -%}"
    "{%- set words = ' ' + turn.words + '\n\n' -%}"
    "{%- if name == 'Assistant' -%}{{- 'Assistant:' -}}{% generation %}{{- words -}}{% endgeneration %}"
    "{%- elif loop.previtem is defined and names[loop.previtem['role']|lower] == 'Assistant' -%}"
    "{% generation %}{{- name + ':' -}}{% endgeneration %}{{- words -}}"
    "{%- else -%}{{- name + ':' + words -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    f"{{{{- 'Assistant:' + ({dict(OPENINGS)}[think] if think else '') -}}}}"
    "{%- endif -%}"
)
UNMARKED = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", CHAT_TEMPLATE)
# Parts of llama.cpp do not interpret templates but recognize some by a piece of their text, which a comment holds here.
GGUF_TEMPLATE = r"{#- {{- 'User: ' + message['content']|trim + '\n\n' -}} -#}" + UNMARKED


def cleaning(template: str, clean: bool) -> str:
    """A template that cleans what is not the assistant's, or without `clean` one that leaves it as it is."""
    return template if clean else template.replace(CLEANING, "")
