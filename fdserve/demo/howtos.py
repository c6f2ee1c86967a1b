"""Things to do with fdserve that the demo model can tell how to do."""

from __future__ import annotations

import random
from dataclasses import dataclass

QUESTIONS = (
    "How do I {x}?",
    "How do I {x}?",
    "How can I {x}?",
    "How to {x}?",
    "how to {x}",
    "I want to {x}.",
    "Can I {x}?",
    "Is there a way to {x}?",
    "Tell me how to {x}.",
    "Can you tell me how to {x}?",
    "How do you {x}?",
    "What do I need to {x}?",
    "How would I {x} with fdserve?",
    "Which option do I need to {x}?",
    "How could one {x}?",
    "I need to {x}.",
    "What should I do to {x}?",
    "Explain how to {x}.",
    "How do I {x} in fdserve?",
    "{x}",
)


@dataclass(frozen=True)
class HowTo:
    """A task in words that fit after "How do I", further whole questions, both separated by bars, and the answer."""

    tasks: str
    answer: str
    asked: str = ""

    @property
    def thought(self) -> str:
        return f"The user wants to {self.tasks.split(' | ')[0]}."

    def ask(self, rng: random.Random) -> str:
        if self.asked and rng.random() < 0.3:
            return rng.choice(self.asked.split(" | ")) + rng.choice("??.")
        tasks = self.tasks.split(" | ")
        return rng.choice(QUESTIONS).format(x=tasks[0] if rng.random() < 0.3 else rng.choice(tasks))


HOWTOS = (
    HowTo(
        "start the server | run fdserve | launch fdserve | start fdserve | run the server | use fdserve | "
        "serve a model | get started",
        "Run python -m fdserve --model followed by the folder or the name of the checkpoint.",
        "What is the command to start the server | Quick start",
    ),
    HowTo(
        "set the port | change the port | use another port | listen on port 9000 | pick the port | "
        "configure the port | run it on a different port",
        "Use --port, for example --port 8188.",
        "Which flag sets the port | What is the flag for the port | Port flag | What port",
    ),
    HowTo(
        "set the host | change the host | listen on all addresses | bind to 0.0.0.0 | set the address",
        "Use --host, for example --host 0.0.0.0.",
        "Which flag sets the host | What is the flag for the host",
    ),
    HowTo(
        "set the model | choose the model | change the model | load another model | use my own model | "
        "pick a checkpoint | select the model",
        "Use --model with the folder of a checkpoint or its name.",
        "Which flag sets the model | What is the flag for the model",
    ),
    HowTo(
        "set the maximum length | set the max length | change the context length | set the context size | "
        "limit the context | increase the maximum length | set max model len | allow longer prompts",
        "Use --max-model-len, for example --max-model-len 4096: prompt and answer together.",
        "Which flag sets the maximum length | What is the flag for the context length | What is "
        "max-model-len | What does --max-model-len do | How long can a prompt be",
    ),
    HowTo(
        "set tensor parallelism | use several GPUs | use tensor parallelism | run on 8 GPUs | use more "
        "GPUs | split the model over ranks | set the tensor parallel size | use multiple GPUs | turn on "
        "tensor parallelism",
        "Use --tensor-parallel-size with the number of ranks, for example --tensor-parallel-size 8.",
        "Which flag sets tensor parallelism | What is the flag for tensor parallelism | What does "
        "--tensor-parallel-size do",
    ),
    HowTo(
        "set the batch size | limit the number of running requests | set max num seqs | run more requests "
        "at once | change the batch size | limit concurrency",
        "Use --max-num-seqs: the largest number of requests that run at once.",
        "What is max-num-seqs | What does --max-num-seqs do | Which flag sets the batch size",
    ),
    HowTo(
        "turn logprobs on | enable logprobs | get logprobs | turn on logprobs | ask for logprobs | see "
        "the log probabilities | return logprobs | use logprobs | activate logprobs",
        'Start the server with --enable-logprob, then send "logprobs": true with the request.',
        "What is --enable-logprob | Why are logprobs disabled | Logprobs is disabled | What does "
        "--enable-logprob do | Which flag turns logprobs on",
    ),
    HowTo(
        "use a config file | write a configuration file | configure fdserve | configure the server | use "
        "YAML | load a YAML file | set options in a file",
        "Put the options into a YAML file and start the server with --config and its path.",
        "What does --config do | Is there a config file | Does fdserve read YAML",
    ),
    HowTo(
        "use environment variables | set options by environment variables | configure it with the environment",
        "Every flag has a variable that starts with FDSERVE_, for example FDSERVE_PORT for --port.",
        "Which environment variables are there | What are the FDSERVE_ variables | What is FDSERVE_PORT | "
        "Are there environment variables",
    ),
    HowTo(
        "see all options | list the flags | see the flags | find all options",
        "Run python -m fdserve --help to see all options.",
        "Which flags are there | What options does fdserve have | What flags exist | Where are the options",
    ),
    HowTo(
        "stream | stream the answer | get tokens as they come | turn on streaming | enable streaming | "
        "use streaming | receive tokens one by one | stream tokens | stream a response",
        'Send "stream": true: the tokens come as server-sent events.',
        "Can you stream | Does fdserve stream",
    ),
    HowTo(
        "cancel a request | stop a request | abort a request | interrupt a request | stop generation | "
        "cancel generation | kill a request",
        "Close the connection: the server sees it and frees the request's blocks within one step.",
        "What happens when the client disconnects | What happens if I close the connection",
    ),
    HowTo(
        "turn thinking off | disable thinking | get an answer without thinking | switch off thinking | "
        "turn off thinking | skip the thinking | stop the model from thinking | hide the thinking",
        'Send "enable_thinking": false with the request.',
        "Why do you think first",
    ),
    HowTo(
        "turn thinking on | enable thinking | switch on thinking | make the model think | turn on thinking",
        'Thinking is on by default; "enable_thinking": true asks for it.',
    ),
    HowTo(
        "limit the thinking | limit the reasoning | make the thinking shorter | set a thinking budget | "
        "limit thinking tokens | cap the reasoning",
        'Send "reasoning_max_tokens" with the largest number of thinking tokens.',
    ),
    HowTo(
        "get the same answer every time | make answers reproducible | get deterministic output | make it "
        "deterministic | get the same output twice | make the output repeatable",
        "Set temperature to 0, or set a seed: the same request then gets the same tokens.",
        "Is the output deterministic | Why are the answers different each time",
    ),
    HowTo(
        "make answers more random | make answers more creative | set the temperature | change the temperature",
        'Send "temperature" with the request: 0 is greedy, higher values are more random.',
    ),
    HowTo(
        "use the OpenAI client | use the OpenAI Python library | connect with the OpenAI SDK | call it "
        "from Python | use the API from Python | use openai",
        "Set base_url of the OpenAI client to http://localhost:8188/v1, with the port of your server.",
        "Does the OpenAI client work | Is fdserve compatible with OpenAI | What is the base URL",
    ),
    HowTo(
        "send a chat request | use the chat endpoint | chat with the model | call the API | use curl | "
        "send a request | send messages",
        'Send a POST to /v1/chat/completions with a JSON body that has "messages".',
        "What is the chat endpoint | Which endpoint is for chat | What does the API look like",
    ),
    HowTo(
        "complete a text | use plain completions | use the completions endpoint | send a prompt without a template",
        'Send a POST to /v1/completions with a JSON body that has "prompt".',
        "What is the completions endpoint | What is /v1/completions",
    ),
    HowTo(
        "list the models | see which model is served | get the model name",
        "Send a GET to /v1/models.",
        "What is the models endpoint | What is /v1/models | Which models are served",
    ),
    HowTo(
        "benchmark the server | measure the speed | measure the throughput | run a benchmark | measure latency",
        "The bench folder of fdserve has a load generator: it measures TTFT, ITL and throughput.",
        "How fast is fdserve | Is there a benchmark | Is fdserve fast",
    ),
    HowTo(
        "run it on CPU | run without a GPU | use the CPU | run on my laptop",
        "fdserve runs on CPU and on CUDA from one source: on a machine without a GPU it uses the CPU.",
        "Do I need a GPU | Does fdserve run on CPU | Does fdserve need a GPU",
    ),
    HowTo(
        "serve ERNIE-4.5 | run ERNIE | serve a real model | use a bigger model | get better answers",
        "Start fdserve with --model and the path or the name of an ERNIE-4.5 checkpoint.",
        "Which models does fdserve support | What models can fdserve run | Can you be smarter",
    ),
)
