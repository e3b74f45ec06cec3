#!/usr/bin/env python3
"""Writes the seed files of request_fuzz from the requests below. Needs protoc.

    tests/fuzz/make_request_corpus.py
"""

import pathlib
import subprocess

HERE = pathlib.Path(__file__).resolve().parent
PROTO = HERE.parents[1] / "proto"
REQUESTS = {
    "text": 'text: "the cat" request_id: "a"',
    "tokens": "token_ids { ids: 1 ids: 2 ids: 263 } n: 3 priority: -5",
    "chat": """chat { messages { role: "system" content: "be brief" }
                      messages { role: "user" content: "the <|im_end|>" }
                      add_generation_prompt: true }""",
    "sampling": """text: "the" sampling { temperature: 0.7 top_k: 40 top_p: 0.9 min_p: 0.05
                   repetition_penalty: 1.1 presence_penalty: -1 frequency_penalty: 2 seed: 7
                   logit_bias { key: 5 value: -100 } logit_bias { key: 6 value: -inf } }""",
    "stop": """text: "the" stop { max_tokens: 100 min_tokens: 3 strings: "end" strings: "\\n"
               token_ids: 9 ignore_eos: true include_stop: true }""",
    "output": """text: "the" output { token_ids: true logprobs: true top_logprobs: 20 echo: true }
                 forced_token_ids: 3 forced_token_ids: 4""",
    "attention": """text: "the" attention { mode: ATTENTION_MODE_RECTIFIED keep_ratio: 0.05
                    min_tokens: 64 local_tokens: 16 sink_tokens: 0 rectify_interval: 64 }""",
    "wrong": 'text: "the" n: 65 sampling { top_p: nan } stop { max_tokens: -1 }',
}


def main():
    folder = HERE / "corpus" / "request_fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in REQUESTS.items():
        wire = subprocess.run(
            ["protoc", f"-I{PROTO}", "--encode=resa.v1.GenerateRequest", "resa/v1/inference.proto"],
            input=text.encode(), stdout=subprocess.PIPE, check=True).stdout
        (folder / name).write_bytes(wire)


if __name__ == "__main__":
    main()
