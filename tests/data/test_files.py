"""Data files as people have them: what each becomes, which columns are named as unused, and why others are refused."""

# ruff: noqa: E501 - a row is easier to read on one line
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub_local.data.calls import check_called, misfit
from adapterhub_local.data.chat import Chat
from adapterhub_local.data.columns import recognise, renamed, unused_columns
from adapterhub_local.data.dataset import read_parts
from adapterhub_local.data.formats import read_chat
from adapterhub_local.data.requests import as_messages
from adapterhub_local.errors import BadData

# file -> bytes; then each example with its roles, `+tools`, and `-column` for each that is not used; or `! ` and the reason
FILES = [
    ('alpaca.jsonl', b'{"instruction": "i", "input": "", "output": "o", "text": "Below is..."}', '<user> i <assistant> o -text'),
    ('alpaca empty output.jsonl', b'{"instruction": "i", "input": "", "output": ""}\n{"instruction": "i", "input": "", "output": "o"}', '! the answer is empty'),
    ('alpaca output list.jsonl', b'{"instruction": "i", "input": "", "output": ["a", "b"]}', "! the column 'output' must be text, not a list (give each of several answers a row of its own)"),
    ('dolly.jsonl', b'{"instruction": "i", "context": "c", "response": "r", "category": "closed_qa"}', '<user> i\n\nc <assistant> r -category'),
    ('oasst.jsonl', b'{"message_id": "1", "parent_id": null, "text": "hi", "role": "prompter", "lang": "en", "rank": null}\n{"message_id": "2", "parent_id": "1", "text": "yo", "role": "assistant", "lang": "en", "rank": 0}', '! put the messages of a conversation into one row, as a list in messages (2 of 2 exa'),
    ('oasst-guanaco.jsonl', b'{"text": "### Human: hi### Assistant: yo"}', '### Human: hi### Assistant: yo'),
    ('sharegpt system col.jsonl', b'{"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}', '<system> s <user> q <assistant> a'),
    ('sharegpt gpt first.jsonl', b'{"conversations": [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}', '<assistant> hello <user> q <assistant> a'),
    ('sharegpt weights.jsonl', b'{"conversations": [{"from": "system", "value": "s", "weight": 0}, {"from": "human", "value": "q", "weight": 0}, {"from": "gpt", "value": "a", "weight": 1}]}', '<system> s <user> q <assistant> a'),
    ('sharegpt conversation singular.jsonl', b'{"conversation": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}', "! data.columns = { messages = 'conversation' } says that it holds the messages"),
    ('slimorca.jsonl', b'{"conversations": [{"from": "system", "value": "s", "weight": null}, {"from": "human", "value": "q", "weight": 0}, {"from": "gpt", "value": "a", "weight": 1}]}', '<system> s <user> q <assistant> a'),
    ('openorca.jsonl', b'{"id": "1", "system_prompt": "s", "question": "q", "response": "r"}', '<system> s <user> q <assistant> r -id'),
    ('ultrachat200k.jsonl', b'{"prompt": "q", "prompt_id": "1", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}', '<user> q <assistant> a -prompt -prompt_id'),
    ('metamath.jsonl', b'{"type": "t", "query": "q", "original_question": "oq", "response": "r"}', '<user> q <assistant> r -original_question -type'),
    ('squad.jsonl', b'{"id": "1", "title": "t", "context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [3]}}', '! not a known format, the example has the columns '),
    ('imdb.jsonl', b'{"text": "t", "label": 1}', "! data.prompt = '{text}' and data.answer = '{label}' make an example of them, and da"),
    ('xlam.json', b'[{"id": 0, "query": "q", "answers": "[{\\"name\\": \\"live\\", \\"arguments\\": {\\"x\\": \\"1\\"}}]", "tools": "[{\\"name\\": \\"live\\", \\"description\\": \\"d\\", \\"parameters\\": {\\"x\\": {\\"type\\": \\"str\\", \\"description\\": \\"d\\"}}}]"}]', '<user> q <assistant> live({"x": "1"}) +tools -id'),
    ('glaive v2.jsonl', b'{"system": "SYSTEM: You are... {\\"name\\":\\"f\\"}", "chat": "USER: hi\\n\\n\\nASSISTANT: yo <|endoftext|>"}', '! not a known format, the example has the columns '),
    ('hermes fc.jsonl', b'{"id": "1", "conversations": [{"from": "system", "value": "tools"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "<tool_call>\\n{}\\n</tool_call>"}, {"from": "tool", "value": "<tool_response>"}, {"from": "gpt", "value": "a"}], "tools": "[{\\"type\\": \\"function\\", \\"function\\": {\\"name\\": \\"f\\", \\"parameters\\": {}}}]", "category": "c"}', '<system> tools <user> q <assistant> <tool_call>\n{}\n</tool_call> <tool> <tool_response> <assistant> a +tools -category -id'),
    ('openai tools.jsonl', b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}]}, {"role": "tool", "tool_call_id": "1", "content": "r"}, {"role": "assistant", "content": "a"}], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "parallel_tool_calls": false}', '<user> q <assistant> f({"x": 1}) <tool> r <assistant> a +tools -parallel_tool_calls'),
    ('openai functions.jsonl', b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{}"}}], "functions": [{"name": "f", "parameters": {}}]}', '<user> q <assistant> f({}) +tools'),
    ('mistral prefs.jsonl', b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "prefix": true}]}', '<user> q <assistant> a -messages.prefix'),
    ('hh.jsonl', b'{"chosen": "\\n\\nHuman: q\\n\\nAssistant: a", "rejected": "\\n\\nHuman: q\\n\\nAssistant: b"}', "! these are preferences (chosen, rejected): set train.objective = 'dpo' to learn from both, or data.columns = { completion = 'chosen' }"),
    ('ultrafeedback.jsonl', b'{"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}], "score_chosen": 9.0, "score_rejected": 2.0}', "! these are preferences (chosen, rejected): set train.objective = 'dpo' to learn from both, or data.columns = { messages = 'chosen' }"),
    ('orca dpo.jsonl', b'{"system": "s", "question": "q", "chosen": "a", "rejected": "b"}', "! these are preferences (chosen, rejected): set train.objective = 'dpo' to learn from both, or data.columns = { completion = 'chosen' }"),
    ('shp.jsonl', b'{"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}', '! not a known format, the example has the columns '),
    ('kto.jsonl', b'{"prompt": "q", "completion": "a", "label": true}', '<user> q <assistant> a'),
    ('scores.jsonl', b'{"prompt": "q", "response": "a", "score": 0.1}', '<user> q <assistant> a -score'),
    ('helpsteer.jsonl', b'{"prompt": "q", "response": "a", "helpfulness": 3, "correctness": 4}', '<user> q <assistant> a -correctness -helpfulness'),
    ('multi answers.jsonl', b'{"prompt": "q", "completions": ["a", "b"]}', '! not a known format, the example has the columns '),
    ('multi answers2.jsonl', b'{"question": "q", "answers": ["a", "b"]}', '! not a known format, the example has the columns '),
    ('prompt completion list.jsonl', b'{"prompt": "q", "completion": ["a", "b"]}', "! the column 'completion' must be text, not a list (give each of several answers a row of its own)"),
    ('reasoning.jsonl', b'{"question": "q", "reasoning": "r", "answer": "a"}', '<user> q <assistant> a -reasoning'),
    ('r1 messages.jsonl', b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "info": {"think_content": "t"}}]}', '<user> q <assistant> a -messages.info'),
    ('openthoughts.jsonl', b'{"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "<|begin_of_thought|>t<|end_of_thought|>a"}]}', '<system> s <user> q <assistant> <|begin_of_thought|>t<|end_of_thought|>a'),
    ('dict of lists.json', b'{"instruction": ["i", "j"], "output": ["o", "p"]}', '<user> i <assistant> o / <user> j <assistant> p'),
    ('dict of lists with ints.json', b'{"id": [1, 2], "prompt": ["i", "j"], "completion": ["o", "p"]}', '<user> i <assistant> o / <user> j <assistant> p -id'),
    ('dict of lists of messages.json', b'{"messages": [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]}', '<user> q <assistant> a / <user> q <assistant> a'),
    ('pandas index.json', b'{"prompt": {"0": "a", "1": "b"}, "completion": {"0": "c", "1": "d"}}', '<user> a <assistant> c / <user> b <assistant> d'),
    ('pandas split.json', b'{"columns": ["prompt", "completion"], "index": [0, 1], "data": [["a", "b"], ["c", "d"]]}', '<user> a <assistant> b / <user> c <assistant> d'),
    ('train key.json', b'{"train": [{"prompt": "a", "completion": "b"}], "validation": [{"prompt": "c", "completion": "d"}]}', '<user> a <assistant> b'),
    ('top list of lists.json', b'[[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]', '<user> q <assistant> a / <user> q <assistant> a'),
    ('jsonl of lists.jsonl', b'[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]\n[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]', '<user> q <assistant> a / <user> q <assistant> a'),
    ('jsonl of strings.jsonl', b'"hello"\n"world"', '! not a known format, the example is not a table'),
    ('mixed.jsonl', b'{"prompt": "a", "completion": "b"}\n{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n{"instruction": "i", "output": "o"}', '! it has the columns of messages, and the first example of the file those of prompt-completion: put them i'),
    ('mixed same.jsonl', b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b", "extra": 1}\n{"prompt": "a"}', '! needs the columns prompt and completion'),
    ('tsv quotes.tsv', b'prompt\tcompletion\n"a ""quoted"" text"\t"b\nc"\n5" pipe\td\n', '<user> a "quoted" text <assistant> b\nc / <user> 5" pipe <assistant> d'),
    ('utf16.csv', b'\xff\xfep\x00r\x00o\x00m\x00p\x00t\x00,\x00c\x00o\x00m\x00p\x00l\x00e\x00t\x00i\x00o\x00n\x00\n\x00a\x00,\x00\xe9\x00\n\x00', '<user> a <assistant> é'),
    ('utf16 nobom.csv', b'p\x00r\x00o\x00m\x00p\x00t\x00,\x00c\x00o\x00m\x00p\x00l\x00e\x00t\x00i\x00o\x00n\x00\n\x00a\x00,\x00\xe9\x00\n\x00', '! not UTF-8 text: save the file as UTF-8'),
    ('cp1252.csv', b'prompt,completion\na,caf\xe9 \x93x\x94\n', '! not UTF-8 text: save the file as UTF-8'),
    ('nan.jsonl', b'{"prompt": "a", "completion": NaN}\n{"prompt": "a", "completion": "b", "score": NaN}', "! the column 'completion' is empty"),
    ("nan beside.jsonl", b'{"prompt": "a", "completion": "b", "system": NaN, "tools": NaN, "image": NaN, "score": NaN}', "<user> a <assistant> b"),
    ("history.jsonl", b'{"instruction": "q2", "output": "a2", "history": [["q", "a"]]}', "<user> q <assistant> a <user> q2 <assistant> a2"),
    ("history text.jsonl", b'{"instruction": "q2", "output": "a2", "history": "once"}', "! history must be a list of [question, answer], all text"),
    ('numbers.jsonl', b'{"prompt": "2+2", "completion": 4}', "! the column 'completion' must be text, not a number; data.prompt and data.answer make text of numbers"),
    ('bools.jsonl', b'{"question": "q", "answer": true}', "! the column 'answer' must be text, not true or false; data.prompt and data.answer make text of numbers"),
    ('numbers.csv', b'question,answer\n2+2,4\n', '<user> 2+2 <assistant> 4'),
    ('csv nan.csv', b'prompt,completion,x\na,nan,\nb,,1\n', '! the answer is empty'),
    ('empty strings.jsonl', b'{"prompt": "", "completion": "b"}\n{"prompt": "a", "completion": "  "}', '! the prompt is empty'),
    ('dupcols.csv', b'prompt,completion,prompt\na,b,c\n', "! two columns are called 'prompt'"),
    ('image bytes.jsonl', b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "image": {"bytes": "xx", "path": null}}', '! the column image is not empty, and only text is supported: leave these examples out'),
    ('llava.jsonl', b'{"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nq"}, {"from": "gpt", "value": "a"}]}', '! the column image is not empty, and only text is supported: leave these examples out'),
    ('audio.jsonl', b'{"audio": {"path": "a.wav", "array": [0.1]}, "text": "transcript"}', '! the column audio is not empty, and only text is supported: leave these examples out'),
    ('pixel.jsonl', b'{"pixel_values": [1, 2], "text": "t"}', 't -pixel_values'),
    ('content parts.jsonl', b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}', '<user> q <assistant> a'),
    ('content string parts.jsonl', b'{"messages": [{"role": "user", "content": ["q"]}, {"role": "assistant", "content": "a"}]}', '! a part of a content is {"type": "text", "text": ...}, or the content is one text'),
    ('anthropic tool.jsonl', b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "so"}, {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]}, {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}]}]}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}], "tools": [{"name": "f", "input_schema": {"type": "object"}}]}', '<user> q <assistant> sof({"a": 1}) <tool> r <user> and <assistant> a +tools'),
    ('anthropic failed.jsonl', b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r", "is_error": true}]}, {"role": "assistant", "content": "a"}], "tools": [{"name": "f"}]}', '<user> q <assistant> f({}) <tool> The call failed: r <assistant> a +tools'),
    ('anthropic thinking.jsonl', b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "text", "text": "a"}]}]}', '<user> q <assistant> a'),
    ('anthropic hidden.jsonl', b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "a"}]}]}', "! a thought is encrypted (redacted_thinking), and only its service can read it: leave it out"),
    ('anthropic picture.jsonl', b'{"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image", "source": {}}]}]}, {"role": "assistant", "content": "a"}]}', "! the result of a call has a part 'image': only text is supported"),
    ('anthropic document.jsonl', b'{"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}, {"role": "assistant", "content": "a"}]}', "! a content has a part 'document': only text is supported"),
    ('vercel.jsonl', b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "reasoning", "text": "t"}, {"type": "tool-call", "toolCallId": "1", "toolName": "f", "input": {"a": 1}}]}, {"role": "tool", "content": [{"type": "tool-result", "toolCallId": "1", "toolName": "f", "output": {"type": "json", "value": {"b": 2}}}]}, {"role": "assistant", "content": "a"}], "tools": [{"name": "f", "parameters": {"type": "object"}}]}', '<user> q <assistant> f({"a": 1}) <tool> {"b": 2} <assistant> a +tools'),
    ('vercel failed.jsonl', b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "tool-call", "toolCallId": "1", "toolName": "f", "input": {}}]}, {"role": "tool", "content": [{"type": "tool-result", "toolCallId": "1", "toolName": "f", "output": {"type": "error-text", "value": "no"}}]}, {"role": "assistant", "content": "a"}], "tools": [{"name": "f"}]}', '<user> q <assistant> f({}) <tool> The call failed: no <assistant> a +tools'),
    ('result in answer.jsonl', b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "tool-call", "toolCallId": "1", "toolName": "f", "input": {}}, {"type": "tool-result", "toolCallId": "1", "toolName": "f", "output": "r"}, {"type": "text", "text": "a"}]}]}', "! a content holds the result of a call beside calls or thoughts: write it into the next"),
    ('gemini.jsonl', b'{"systemInstruction": {"role": "system", "parts": [{"text": "s"}]}, "contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]}', '<system> s <user> q <assistant> a'),
    ('batch request.jsonl', b'{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": [{"role": "user", "content": "q"}]}}', "! a request of a batch file, and its answer is in the batch's output file: put the request of the same custom_id"),
    ('log line.jsonl', b'{"request": {"messages": [{"role": "user", "content": "q"}], "model": "m"}, "response": {"choices": [{"message": {"role": "assistant", "content": "a"}}]}}', '<user> q <assistant> a -request.model'),
    ('python repr.csv', b'messages\n"[{\'role\': \'user\', \'content\': \'q\'}, {\'role\': \'assistant\', \'content\': \'a\'}]"\n', '! the column messages is text that is not JSON: this is how Python prints it, write it with json.dumps'),
    ('capital columns.csv', b'Prompt,Completion\na,b\n', '<user> a <assistant> b'),
    ('spaces columns.csv', b'prompt ,completion \na,b\n', '<user> a <assistant> b'),
    ('Question Answer.csv', b'Question,Answer\na,b\n', '<user> a <assistant> b'),
    ('input output.csv', b'input,output\na,b\n', '<user> a <assistant> b'),
    ('no header.csv', b'what is it,a thing\nhow,so\n', '! not a known format, the example has the columns '),
    ('index col.csv', b',prompt,completion\n0,a,b\n1,c,d\n', '<user> a <assistant> b / <user> c <assistant> d -'),
    ('csv extra field.csv', b'prompt,completion\na,b,c\n', '! this row does not have the 2 columns of the header'),
    ('json5.json', b"{'prompt': 'a'}", '! not JSON: Expecting property name enclosed in double quotes at line 1'),
    ('jsonl pretty.jsonl', b'{\n "prompt": "a",\n "completion": "b"\n}', '! an example goes over several lines: write each on one line, or all as one list in a .json file'),
    ('trailing comma.json', b'[{"prompt":"a","completion":"b"},]', '! not JSON: Expecting value at line 1'),
    ('concatenated.json', b'{"prompt":"a","completion":"b"}{"prompt":"c","completion":"d"}', '! not JSON: Extra data at line 1'),
    ('translation.jsonl', b'{"translation": {"en": "a", "de": "b"}}', '! not a known format, the example has the columns '),
    ('tokens.jsonl', b'{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}', '! give the text'),
    ('instruction only.jsonl', b'{"instruction": "i", "answer": "o"}', '! not a known format, the example has the columns '),
    ('chosen only.jsonl', b'{"prompt": "q", "chosen": "a"}', '! not a known format, the example has the columns '),
    ('inputs targets.jsonl', b'{"inputs": "q", "targets": "a"}', '<user> q <assistant> a'),
    ('prompt response chosen none.jsonl', b'{"prompt": "q", "response": "a", "chosen": null, "rejected": null}', '<user> q <assistant> a'),
    ('batch body.jsonl', b'{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": [{"type": "function", "function": {"name": "f"}}]}}', '<user> q <assistant> a +tools -body.model -custom_id -method -url'),
    ('batch body as text.csv', b'custom_id,body\n1,"{""messages"": [{""role"": ""user"", ""content"": ""q""}, {""role"": ""assistant"", ""content"": ""a""}]}"\n', '<user> q <assistant> a -custom_id'),
    ('batch output.jsonl', b'{"id": "b", "custom_id": "1", "response": {"status_code": 200, "body": {"choices": [{"message": {"role": "assistant", "content": "a"}}]}}, "error": null}', "! a line of a batch's output, which has the answer without what was asked: put the request of the same custom_id"),
    ('batch joined.jsonl', b'{"custom_id": "1", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "q"}]}, "response": {"status_code": 200, "body": {"choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": "a", "refusal": null}}]}}, "error": null}', '<user> q <assistant> a -custom_id -url'),
    ('batch failed.jsonl', b'{"custom_id": "1", "body": {"messages": [{"role": "user", "content": "q"}]}, "response": {"status_code": 429, "body": {"error": {}}}, "error": null}', '! the request failed (status 429), and has no answer: leave the row out'),
    ('batch expired.jsonl', b'{"custom_id": "1", "body": {"messages": [{"role": "user", "content": "q"}]}, "response": null, "error": {"code": "batch_expired"}}', '! the request failed, and has no answer: leave the row out'),
    ('batch cut.jsonl', b'{"custom_id": "1", "body": {"messages": [{"role": "user", "content": "q"}]}, "response": {"status_code": 200, "body": {"choices": [{"finish_reason": "length", "message": {"role": "assistant", "content": "a"}}]}}}', "! the answer is not whole (it ended by 'length'), and would be learned with an end: leave it out"),
    ('batch two choices.jsonl', b'{"messages": [{"role": "user", "content": "q"}], "choices": [{"message": {"role": "assistant", "content": "a"}}, {"message": {"role": "assistant", "content": "b"}}]}', '! the request got 2 choices: give each a row of its own, or keep one'),
    ('batch no choices.jsonl', b'{"messages": [{"role": "user", "content": "q"}], "choices": [3]}', '! the response holds no choices with a message: leave the row out'),
    ('batch responses.jsonl', b'{"custom_id": "1", "url": "/v1/responses", "body": {"model": "m", "input": "q"}}', '! a request to /v1/responses: of batch files those with messages (/v1/chat/completions) are read'),
    ('batch embeddings.jsonl', b'{"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"model": "m", "input": "q"}}', '! a request to /v1/embeddings: of batch files those with messages'),
    ('pair with params.jsonl', b'{"prompt": "q", "completion": "a", "params": {"input": 3}, "response": {"body": 1}}', '<user> q <assistant> a -params -response'),
    ('text with request.jsonl', b'{"text": "t", "request": {"messages": []}}', 't -request'),
    ('batch empty.jsonl', b'{"custom_id": "1", "body": {"messages": []}}', "! a request of a batch file, and its answer is in the batch's output file"),
    ('batch odd.jsonl', b'{"custom_id": "1", "body": {"messages": 3}, "response": 4, "result": [5], "error": 6}', '! the request failed, and has no answer'),
    ('batch of odd messages.jsonl', b'{"custom_id": "1", "body": {"messages": {"a": 1}}}', '! the messages of the request are not a list'),
    ('gemini odd.jsonl', b'{"contents": [{"parts": [{"functionCall": 3}, {"functionResponse": "x"}]}]}', '! a part of contents must be text, or a functionCall or functionResponse as a table'),
    ('gemini odd tools.jsonl', b'{"contents": [{"parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}], "tools": [{"functionDeclarations": [3]}]}', '! a function is {"name": ..., "description": ..., "parameters": ...}'),
    ('gemini odd system.jsonl', b'{"systemInstruction": 3, "contents": [{"parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]}', '! a content is {"role": "user", "parts": [{"text": ...}]}'),
    ('gemini odd part.jsonl', b'{"contents": [{"parts": [3]}, {"role": "model", "parts": [{"text": 4}]}]}', '! a part of contents holds nothing'),
    ('gemini odd candidate.jsonl', b'{"request": {"contents": [{"parts": [{"text": "q"}]}]}, "response": {"candidates": [3]}}', '! the response holds no candidate with a content'),
    ('anthropic batch.jsonl', b'{"custom_id": "1", "params": {"model": "m", "max_tokens": 9, "system": [{"type": "text", "text": "s"}], "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}]}}', '<system> s <user> q <assistant> a +tools -custom_id -params.max_tokens -params.model'),
    ('anthropic asked.jsonl', b'{"custom_id": "1", "params": {"messages": [{"role": "user", "content": "q"}]}}', "! a request of a batch file, and its answer is in the batch's output file"),
    ('anthropic output.jsonl', b'{"custom_id": "1", "result": {"type": "succeeded", "message": {"role": "assistant", "content": [{"type": "text", "text": "a"}]}}}', "! a line of a batch's output, which has the answer without what was asked"),
    ('anthropic joined.jsonl', b'{"custom_id": "1", "params": {"messages": [{"role": "user", "content": "q"}]}, "result": {"type": "succeeded", "message": {"role": "assistant", "stop_reason": "end_turn", "content": [{"type": "text", "text": "a"}]}}}', '<user> q <assistant> a -custom_id'),
    ('anthropic cut.jsonl', b'{"custom_id": "1", "params": {"messages": [{"role": "user", "content": "q"}]}, "result": {"type": "succeeded", "message": {"stop_reason": "max_tokens", "content": "a"}}}', "! the answer is not whole (it ended by 'max_tokens')"),
    ('anthropic errored.jsonl', b'{"custom_id": "1", "params": {"messages": [{"role": "user", "content": "q"}]}, "result": {"type": "errored", "error": {}}}', '! the request has no answer, it errored: leave the row out'),
    ('openai preference.jsonl', b'{"input": {"messages": [{"role": "user", "content": "q"}], "tools": [], "parallel_tool_calls": true}, "preferred_output": [{"role": "assistant", "content": "a"}], "non_preferred_output": [{"role": "assistant", "content": "b"}]}', "! these are preferences (chosen, rejected): set train.objective = 'dpo' to learn from both, or data.columns = { completion = 'chosen' }"),
    ('openai preference broken.jsonl', b'{"input": "q", "preferred_output": "a", "non_preferred_output": "b"}', '! write {"input": {"messages": [...]}, "preferred_output": [...], ...}'),
    ('openai rft.jsonl', b'{"messages": [{"role": "user", "content": "q"}], "reference_answer": "a"}', "! the last message is the user's, as in rows for reinforcement fine-tuning, and the column 'reference_answer' says what is right: data.columns = { prompt = 'messages', completion = 'reference_answer' } takes it for the answer"),
    ('openai rft table.jsonl', b'{"messages": [{"role": "user", "content": "q"}], "id": 3, "expected": {"x": 1}}', "! says what is right: write it as text, and data.columns = { prompt = 'messages', completion = 'expected' }"),
    ('asked only.jsonl', b'{"messages": [{"role": "user", "content": "q"}], "id": 3}', "! the last message is the user's, and must be the assistant's answer"),
    ('gemini tools.jsonl', b'{"contents": [{"parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "t", "thought": true}, {"functionCall": {"name": "f", "args": {"x": 1}}}]}, {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"y": 2}}}]}, {"role": "model", "parts": [{"text": "a"}, {"text": "b", "thoughtSignature": "z"}]}], "tools": [{"functionDeclarations": [{"name": "f", "parameters": {"type": "OBJECT", "properties": {"x": {"type": "INTEGER"}}}}]}], "generationConfig": {"temperature": 1}}', '<user> q <assistant> f({"x": 1}) <tool> {"y": 2} <assistant> ab +tools -generationConfig'),
    ('gemini snake.jsonl', b'{"system_instruction": "s", "contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"function_call": {"name": "f"}}]}]}', '<system> s <user> q <assistant> f({})'),
    ('gemini asked.jsonl', b'{"contents": [{"role": "user", "parts": [{"text": "q"}]}]}', "! the last message is the user's, and must be the assistant's answer"),
    ('gemini batch.jsonl', b'{"key": "1", "request": {"contents": [{"role": "user", "parts": [{"text": "q"}]}]}, "response": {"candidates": [{"content": {"role": "model", "parts": [{"text": "a"}]}, "finishReason": "STOP"}]}}', '<user> q <assistant> a -key'),
    ('gemini cut.jsonl', b'{"request": {"contents": [{"parts": [{"text": "q"}]}]}, "response": {"candidates": [{"content": {"parts": [{"text": "a"}]}, "finishReason": "MAX_TOKENS"}]}}', "! the answer is not whole (it ended by 'MAX_TOKENS')"),
    ('gemini image.jsonl', b'{"contents": [{"role": "user", "parts": [{"text": "q"}, {"inlineData": {"data": "x"}}]}, {"role": "model", "parts": [{"text": "a"}]}]}', '! a part of contents holds inlineData: only text, calls and results are supported'),
    ('gemini search.jsonl', b'{"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}], "tools": [{"googleSearch": {}}]}', '! tools has googleSearch, which only Gemini runs: leave it out'),
    ('vertex.jsonl', b'{"input_text": "q", "output_text": "a"}', '<user> q <assistant> a'),
    ('ai studio.csv', b'text_input,output\nq,a\n', '<user> q <assistant> a'),
    ('prompt text completion messages.jsonl', b'{"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]}', '<user> q <assistant> a'),
    ('answer of json.jsonl', b'{"prompt": "q", "completion": "[{\\"role\\": 1}]"}', '<user> q <assistant> [{"role": 1}]'),
    ('quoted header.csv', b'"prompt, long";completion\na;b\n', "! data.columns = { prompt = 'prompt, long' } says that it is the prompt"),
    ('half a pair.jsonl', b'{"prompt": "q", "reply": "a", "n": 3}', "! data.columns = { completion = 'reply' } says that it is the completion"),
    ('answer alone.jsonl', b'{"messages": [{"role": "assistant", "content": "a"}]}', '! the prompt is empty'),
    ('greeting.jsonl', b'{"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]}', '<system> s <assistant> a'),
    ('log of messages.jsonl', b'{"input": [{"role": "user", "content": "q"}], "output": {"role": "assistant", "content": "a"}}', '<user> q <assistant> a'),
    ('log of text.jsonl', b'{"input": "q", "output": {"role": "assistant", "content": "a"}}', '<user> q <assistant> a'),
    ('bedrock.jsonl', b'{"messages": [{"role": "user", "content": [{"text": "q"}]}, {"role": "assistant", "content": [{"text": "a"}]}]}', '<user> q <assistant> a'),
    ('bedrock image.jsonl', b'{"messages": [{"role": "user", "content": [{"image": {}}]}, {"role": "assistant", "content": [{"text": "a"}]}]}', '! a part of a content is {"type": "text", "text": ...}, or the content is one text'),
    ('blank prompt.jsonl', b'{"prompt": " \\n", "completion": "b"}', '! the prompt is empty; a text without a prompt is a row with the one column text'),
    ('blank instruction.jsonl', b'{"instruction": "", "input": " ", "output": "o"}', '! the prompt is empty'),
    ('blank message.jsonl', b'{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]}', '! the prompt is empty'),
    ('blank parts.jsonl', b'{"messages": [{"role": "user", "content": []}, {"role": "assistant", "content": "a"}]}', '! the prompt is empty'),
    ('blank turn.jsonl', b'{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "  "}, {"from": "gpt", "value": "b"}]}', '! a message of the user is empty'),
    ('blank history.jsonl', b'{"instruction": "q", "output": "a", "history": [["", "x"]]}', '! a message of the user is empty'),
]  # fmt: skip


def told(chat: Chat) -> str:
    """A chat on one line."""
    turns = [
        f"<{message['role']}> {message['content']}"
        + "".join(
            f"{call['function']['name']}({json.dumps(call['function']['arguments'])})"
            for call in message.get("tool_calls", ())
        )
        for message in chat.messages
    ]
    return chat.text or " ".join(turns)


@pytest.mark.parametrize(("name", "content", "wanted"), FILES, ids=[name for name, _, _ in FILES])
def test_files_that_people_have(tmp_path: Path, name: str, content: bytes, wanted: str) -> None:
    """Every file is read as what it says, its unused columns named, or refused with the true reason."""
    path = tmp_path / name
    path.write_bytes(content)
    if wanted.startswith("! "):
        with pytest.raises(BadData) as caught:
            read_parts([path], "train")
        assert wanted[2:] in str(caught.value)
        assert str(path) in str(caught.value)
        return
    (part,) = read_parts([path], "train")
    unused = part.record.get("unused", [])
    tools = " +tools" if any(chat.tools for chat in part.chats) else ""

    assert " / ".join(map(told, part.chats)) + tools + "".join(f" -{column}" for column in unused) == wanted
    assert all(column in " ".join(part.notes) for column in unused)


ODD = (None, 3, True, "", "x", "[", [], [3], {}, {"a": 1})


def spoiled(value: object) -> Iterator[object]:
    """A value with one of its parts replaced by something else, in every way."""
    yield from ODD
    if isinstance(value, dict):
        for key, part in value.items():
            yield from ({**value, key: other} for other in spoiled(part))
            yield {name: other for name, other in value.items() if name != key}
    if isinstance(value, list):
        for at, part in enumerate(value):
            yield from ([*value[:at], other, *value[at + 1 :]] for other in spoiled(part))


SERVICES = ("batch", "anthropic", "openai", "gemini", "log", "bedrock", "vercel")


@pytest.mark.parametrize("shape", ["answers", "pairs"])
def test_spoiled_rows_are_refused_or_read(shape: str) -> None:
    """Whatever stands in whichever place of a service's row: it is read, or bad data, and nothing else is raised."""
    rows = [json.loads(content) for name, content, _ in FILES if name.startswith(SERVICES) and name.endswith(".jsonl")]
    kept = 0
    for row in (other for given in rows for other in spoiled(given)):
        with contextlib.suppress(BadData):
            ours = renamed(as_messages(row, "here"), None)
            kind = recognise(ours, "here", shape)
            chat = read_chat(ours, "here", kind)
            check_called(chat)
            assert misfit(chat) is None or chat.tools
            assert all(isinstance(message["content"], str) for message in chat.messages)
            assert all(isinstance(column, str) for column in unused_columns(ours, kind))
            kept += 1
    assert kept > (200 if shape == "answers" else 0)
