"""The ERNIE-4.5 family's two dialogue formats, for checkpoints that come without a chat template."""

from __future__ import annotations

# Roles by name, a separator after each answer; no tools, no thinking. Other roles are left out.
PLAIN = """\
{%- if add_generation_prompt is not defined %}{% set add_generation_prompt = true %}{% endif -%}
{{- cls_token | default("<|begin_of_sentence|>") -}}
{%- for message in messages -%}
    {%- if message.role in ("system", "developer") -%}
        {{- (message.content or "") ~ "\\n" -}}
    {%- elif message.role == "user" -%}
        {{- "User: " ~ (message.content or "") ~ "\\n" -}}
    {%- elif message.role == "assistant" -%}
        {{- "Assistant: " ~ (message.content or "") ~ (sep_token | default("<|end_of_sentence|>")) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "Assistant: " }}{% endif -%}
"""

# Turns between <|im_start|> and <|im_end|>; the prompt always ends by opening a thought, also without
# add_generation_prompt, as the checkpoints' own template does. Thoughts of earlier turns are left out.
THINKING = """\
{%- set has_system = messages and messages[0].role in ("system", "developer") -%}
{{- "<|im_start|>system\\n" -}}
{%- if has_system -%}
    {{- "<system_setting>\\n" ~ (messages[0].content or "") ~ "\\n</system_setting>\\n\\n" -}}
{%- endif -%}
{{- "<global_setting>\\nthink_mode=True\\n</global_setting>" -}}
{%- if tools -%}
    {{- "\\n\\n<tool_list>\\n" ~ (tools | tojson) ~ "\\n</tool_list>" -}}
{%- endif -%}
{{- "<|im_end|>\\n\\n" -}}
{%- for message in (messages[1:] if has_system else messages) -%}
    {%- set content = message.content or "" -%}
    {%- if message.role in ("system", "developer") -%}
        {{- "<|im_start|>system\\n" ~ content ~ "<|im_end|>\\n\\n" -}}
    {%- elif message.role == "user" -%}
        {{- "<|im_start|>user\\n" ~ content ~ "<|im_end|>\\n\\n" -}}
    {%- elif message.role == "tool" -%}
        {{- "<|im_start|>user\\n<tool_response>\\n" ~ content ~ "\\n</tool_response><|im_end|>\\n\\n" -}}
    {%- elif message.role == "assistant" -%}
        {{- "<|im_start|>assistant" -}}
        {%- if content or not message.tool_calls -%}
            {{- "\\n<response>\\n" ~ content ~ "\\n</response>\\n" -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {%- set arguments = call.function.arguments -%}
            {{- "\\n<tool_call>\\n{\\"name\\": " ~ (call.function.name | tojson) ~ ", \\"arguments\\": " -}}
            {{- arguments if arguments is string else (arguments | tojson) -}}
            {{- "}\\n</tool_call>\\n" -}}
        {%- endfor -%}
        {{- "<|im_end|>\\n\\n" -}}
    {%- endif -%}
{%- endfor -%}
{{- "<|im_start|>assistant\\n<think>\\n" -}}
"""

FAMILY_TEMPLATES = {"plain": PLAIN, "thinking": THINKING}
