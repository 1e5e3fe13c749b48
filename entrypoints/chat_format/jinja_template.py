"""The prompt format as a Jinja template, written to converted checkpoints for programs that render chat templates."""

import json
from collections.abc import Sequence

from entrypoints.chat_format.builtin_tools import BUILTIN_TOOLS, GLM4_FUNCTION_NOTE, GLM4_INTRODUCTION
from entrypoints.chat_format.tool_calls import TOOLS_INTRODUCTION

# tokenizers adds the SentencePiece dummy prefix to each text between special tokens. The header therefore gets one
# automatically; the blank after the header's newline is the dummy prefix of the body.
_GUARD_JINJA = """\
{%- for token in CONTROL %}{% if token in PREFIX ~ '\\n' ~ (tools | tojson if tools else '') -%}
{{ raise_exception('the tools or the source prefix contain the text of a special token; send token ids instead') }}
{%- endif %}{% endfor -%}
{%- for message in messages %}{% set number = loop.index0 -%}
{%- set called = (message.metadata or '') ~ '\\n' ~ (message.tools | tojson if message.tools else '') -%}
{%- for token in CONTROL %}{% if token in (message.content or '') ~ '\\n' ~ called -%}
{{ raise_exception('turn ' ~ number ~ ' contains the text of a special token; send token ids instead') }}
{%- endif %}{% endfor %}{% endfor -%}
"""
_CHATGLM3_JINJA = """\
[gMASK]<sop>
{%- if tools and not (messages and messages[0].role == 'system') -%}
<|system|>{{ '\\n ' ~ INTRODUCTION ~ '\\n' ~ (tools | tojson(indent=4)) }}
{%- endif -%}
{%- for message in messages -%}
{%- set body = (PREFIX if message.role == 'user' else '') ~ (message.content or '') -%}
{%- set offered = message.tools or (tools if message.role == 'system' and loop.first else none) -%}
{%- if offered %}{% set body = body ~ '\\n' ~ (offered | tojson(indent=4)) %}{% endif -%}
<|{{ message.role }}|>{{ (message.metadata or '') ~ '\\n' ~ (' ' ~ body if body else '') }}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""
_ROUND_JINJA = """\
{%- set rounds = namespace(number=0) -%}
[gMASK]<sop>{{ PREFIX }}
{%- for message in messages -%}
{%- if message.role == 'user' %}{% set rounds.number = rounds.number + 1 -%}
{{ '[Round ' ~ rounds.number ~ ']\\n\\n问：' ~ message.content ~ '\\n\\n答：' }}
{%- elif message.role == 'assistant' %}{{ message.content ~ '\\n\\n' }}
{%- else %}{{ raise_exception('the template `round` has no ' ~ message.role ~ ' turn') }}{% endif -%}
{%- endfor -%}
"""

# A function in OpenAI's form or alone. Text and header are one text here: leading line breaks of a content join it.
_GLM4_JINJA = """\
[gMASK]<sop>
{%- macro offer(offered) -%}
<|system|>{{ '\\n' ~ GLM4_INTRODUCTION }}
{%- for tool in offered -%}
{%- if tool.type in BUILTIN %}{{ '\\n\\n## ' ~ tool.type ~ '\\n\\n' ~ BUILTIN[tool.type] }}
{%- else %}{% set function = tool.function or tool -%}
{{ '\\n\\n## ' ~ function.name ~ '\\n\\n' ~ (function | tojson(indent=4)) ~ '\\n' ~ FUNCTION_NOTE }}
{%- endif %}{% endfor -%}
{%- endmacro -%}
{%- if tools and not (messages and messages[0].tools) %}{{ offer(tools) }}{% endif -%}
{%- for message in messages -%}
{%- if message.tools %}{{ offer(message.tools) }}{% endif -%}
{%- if message.content -%}
<|{{ message.role }}|>{{ (message.metadata or '') ~ '\\n' }}
{{- (PREFIX if message.role == 'user' else '') ~ message.content }}
{%- endif %}{% endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""
_BODIES = {
    "chatglm3": _CHATGLM3_JINJA.replace("INTRODUCTION", json.dumps(TOOLS_INTRODUCTION)),
    "round": _ROUND_JINJA,
    "glm4": _GLM4_JINJA.replace("GLM4_INTRODUCTION", json.dumps(GLM4_INTRODUCTION, ensure_ascii=False))
    .replace("FUNCTION_NOTE", json.dumps(GLM4_FUNCTION_NOTE, ensure_ascii=False))
    .replace("BUILTIN", json.dumps(BUILTIN_TOOLS, ensure_ascii=False)),
}


def build_jinja_template(template: str, source_prefix: str, special_tokens: Sequence[str]) -> str:
    """Jinja text of a prompt template, with the given constants inserted."""
    guard = _GUARD_JINJA.replace("CONTROL", json.dumps(special_tokens))
    text = guard + _BODIES[template]
    # last: the prefix may contain the other placeholders
    return text.replace("PREFIX", json.dumps(source_prefix, ensure_ascii=False))
