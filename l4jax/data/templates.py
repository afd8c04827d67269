"""Chat templates for transformers that write conversations as `l4jax.data.chat` renders them.

A template is a Jinja program in an exported directory (`chat_template.jinja`); transformers, vLLM
and others run it to turn messages into one text. Ours write turn for turn what `chat.render` does,
with `tool_format="json"`: content unstripped, no default system prompt, no dates, tool results
under the ipython header, and Llama 4's `<|eom|>` after tool calls and tool results, as in Meta's
chat format. Meta's own templates strip content and differ in that last point.

One text cannot say all that tokens can. `chat.render` encodes each part by itself; the reader of a
template encodes the text as a whole, so content that begins with a line break shares a token with
the header's end, and special names inside content become special tokens unless the reader escapes
them.
"""

from string import Template

from l4jax.data.tokenizer import Family

_LLAMA3 = """\
{%- set start, end = "<|start_header_id|>", "<|end_header_id|>" -%}
{%- set eot, eom, tool_eom = "<|eot_id|>", "<|eom_id|>", "<|eot_id|>" -%}
{%- set image, code_tag = none, "<|python_tag|>" -%}
"""
_LLAMA4 = """\
{%- set start, end = "<|header_start|>", "<|header_end|>" -%}
{%- set eot, eom, tool_eom = "<|eot|>", "<|eom|>", "<|eom|>" -%}
{%- set image, code_tag = "<|image|>", "" -%}
"""

# Every tag strips the white space around it, so that the text is the same whatever the reader's
# trim_blocks and lstrip_blocks are.
_BODY = Template("""\
${marks}
{#- Content: a string, or parts of text and images. -#}
{%- macro write_content(content, where) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content is undefined or content is mapping or content is not iterable -%}
    {{- raise_exception(where ~ ": content must be a string or a list of parts.") -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part is mapping and part["type"] == "text" and part["text"] is string -%}
        {{- part["text"] -}}
      {%- elif image and part is mapping and part["type"] == "image" -%}
        {{- image -}}
      {%- else -%}
        {{- raise_exception(where ~ ": a part of the content is neither text"
            ~ (" nor an image." if image else "; this model reads text only.")) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}

{#- A tool call: the built-in tools have forms of their own, others are JSON objects. -#}
{%- macro write_call(name, arguments, where) -%}
  {%- if name is not string or arguments is not mapping -%}
    {{- raise_exception(where ~ ": a tool call needs a name, and arguments as a dictionary.") -}}
  {%- elif name in ["brave_search", "wolfram_alpha", "photogen"] -%}
    {%- if arguments["query"] is not string -%}
      {{- raise_exception(where ~ ": " ~ name ~ " needs a text argument 'query'.") -}}
    {%- endif -%}
    {{- name ~ '.call(query="' ~ arguments["query"] ~ '")' -}}
  {%- elif name == "code_interpreter" -%}
    {%- if arguments["code"] is not string -%}
      {{- raise_exception(where ~ ": code_interpreter needs a text argument 'code'.") -}}
    {%- endif -%}
    {{- arguments["code"] -}}
  {%- else -%}
    {{- '{"type": "function", "name": ' ~ name | tojson(ensure_ascii=true)
        ~ ', "parameters": ' ~ arguments | tojson(ensure_ascii=true) ~ '}' -}}
  {%- endif -%}
{%- endmacro -%}

{%- if tools -%}
  {{- raise_exception("This template writes no tool definitions; describe the tools in the "
      ~ "system message.") -}}
{%- endif -%}
{{- "<|begin_of_text|>" -}}
{%- for message in messages -%}
  {%- set where = "message " ~ loop.index0 -%}
  {%- set role = message["role"] -%}
  {%- if role not in ["system", "user", "assistant", "tool", "ipython"] -%}
    {{- raise_exception(where ~ ": role '" ~ role ~ "' is not one of system, user, assistant, "
        ~ "tool and ipython.") -}}
  {%- endif -%}
  {%- set reason = message["stop_reason"] or none -%}
  {%- if reason not in [none, "end_of_turn", "end_of_message", "out_of_tokens"] -%}
    {{- raise_exception(where ~ ": stop_reason '" ~ reason ~ "' is unknown.") -}}
  {%- endif -%}
  {%- set calls = message["tool_calls"] or [] -%}
  {%- if calls and role != "assistant" -%}
    {{- raise_exception(where ~ ": only the assistant makes tool calls.") -}}
  {%- endif -%}
  {%- set header = "ipython" if role == "tool" else role -%}
  {{- start ~ header ~ end ~ "\\n\\n" -}}
  {%- for call in calls[:1] -%}
    {{- code_tag if (call["function"] or call)["name"] == "code_interpreter" -}}
  {%- endfor -%}
  {%- set content = message["content"] -%}
  {%- if not (calls and (content is undefined or content is none)) -%}
    {{- write_content(content, where) -}}
  {%- endif -%}
  {%- for call in calls -%}
    {%- set call = call["function"] or call -%}
    {{- write_call(call["name"], call["arguments"], where) -}}
  {%- endfor -%}
  {%- if role == "assistant" and reason == "end_of_message" -%}
    {{- eom -}}
  {%- elif calls or header == "ipython" -%}
    {{- tool_eom -}}
  {%- else -%}
    {{- eot -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- start ~ "assistant" ~ end ~ "\\n\\n" -}}
{%- endif -%}
""")


def chat_template(family: Family) -> str:
    """The Jinja template of a family, to be written as `chat_template.jinja`.

    It takes `messages` as `chat.render` does, except that a tool call's arguments must be a
    dictionary, as JSON cannot be read in a template; and for Llama 4 also `{"type": "image"}`
    parts, each written `<|image|>` for the processor to expand. It refuses `tools`, whose wording
    belongs into the system message, and whatever is malformed, through `raise_exception`.

    Args:
        family: "llama3" or "llama4".
    """
    return _BODY.substitute(marks={"llama3": _LLAMA3, "llama4": _LLAMA4}[family].strip())
