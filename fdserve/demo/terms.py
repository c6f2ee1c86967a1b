"""Terms of LLM serving that the demo model can define."""

from __future__ import annotations

import random
from dataclasses import dataclass

QUESTIONS = (
    "What is {x}?",
    "What is {x}?",
    "What is {x}",
    "what's {x}?",
    "What are {x}?",
    "Explain {x}.",
    "Explain {x} to me.",
    "Define {x}.",
    "Tell me about {x}.",
    "Tell me what {x} is.",
    "Can you explain {x}?",
    "What does {x} mean?",
    "Describe {x}.",
    "{x}",
    "{x}?",
    "What do you know about {x}?",
    "I want to know what {x} is.",
    "How does {x} work?",
    "Do you know what {x} is?",
    "Explain {x} in one sentence.",
    "What is {x} in LLM serving?",
    "Why {x}?",
    "What is meant by {x}?",
    "Give me a definition of {x}.",
    "What is {x} in fdserve?",
    "Could you tell me what {x} is?",
    "I do not understand {x}.",
    "What exactly is {x}?",
    "Briefly, what is {x}?",
    "Why do I need {x}?",
)
# Names that keep their small first letter at the start of a sentence, beside those with an underscore.
_SMALL = ("fdserve", "temperature", "logprobs", "seed", "bf16")


@dataclass(frozen=True)
class Term:
    """A term: its names and further whole questions, separated by bars, and the definition from the verb on.

    The first name starts the answer. There is one answer on purpose: a model of three million parameters memorises
    one sentence a question well, and what it says can then be checked.
    """

    names: str
    definition: str
    asked: str = ""

    @property
    def name(self) -> str:
        return self.names.split(" | ")[0]

    @property
    def answer(self) -> str:
        keep = "_" in self.name or self.name in _SMALL
        return f"{self.name if keep else self.name[0].upper() + self.name[1:]} {self.definition}"

    @property
    def thought(self) -> str:
        return f"The user asks about {self.name}."

    def ask(self, rng: random.Random) -> str:
        if self.asked and rng.random() < 0.3:
            return rng.choice(self.asked.split(" | ")) + rng.choice("??.")
        name = self.name if rng.random() < 0.4 else rng.choice(self.names.split(" | "))
        return rng.choice(QUESTIONS).format(x=name)


TERMS = (
    Term(
        "fdserve | FDServe | fd serve | this server | the server | this project",
        "is an OpenAI-compatible inference server for ERNIE-4.5 models on PaddlePaddle. It runs on CPU and on CUDA.",
        "What does fdserve do | What is this server | What software is this | Why should I use fdserve | "
        "What is fdserve for | What is fdserve used for | What runs this model",
    ),
    Term(
        "LLM serving | model serving | an inference server | LLM inference | inference | serving",
        "is running a language model for many users at once: requests come in over HTTP, and tokens go out.",
    ),
    Term(
        "an LLM | LLM | a language model | a large language model | language models",
        "is a neural network that predicts the next token of a text, again and again.",
    ),
    Term(
        "a token | token | tokens",
        "is a piece of text, such as a word, a part of a word or a digit; models read and write token ids.",
    ),
    Term(
        "a tokenizer | tokenizer | the tokenizer | tokenization",
        "is what turns text into token ids and token ids back into text.",
    ),
    Term(
        "a KV cache | KV cache | the KV cache | the key-value cache | kv caching | KV-cache",
        "is the memory of the attention keys and values of earlier tokens, so that they are not computed again.",
    ),
    Term(
        "a block | block | KV cache block | KV block | a cache block | blocks",
        "is a fixed number of slots of the KV cache; the cache is handed out block by block.",
    ),
    Term(
        "a slot | slot | KV cache slot | slots | a cache slot",
        "is the place of one token in the KV cache; a block has a fixed number of slots.",
    ),
    Term(
        "a block table | block table | the block table | block tables",
        "is the list of the blocks that hold a sequence, in order.",
    ),
    Term(
        "paged attention | PagedAttention",
        "is attention over a KV cache that is split into blocks, found through a block table.",
    ),
    Term(
        "prefix caching | prefix cache | the prefix cache | automatic prefix caching | prompt caching",
        "is the reuse of cached blocks by requests that start with the same tokens, so that they are not "
        "computed again.",
        "What does prefix caching do | Is prefix caching on | How do I turn on prefix caching | How do I "
        "enable prefix caching | Does fdserve cache prompts",
    ),
    Term(
        "chunked prefill | prefill chunking | chunked prefilling",
        "is the splitting of a long prompt into pieces, so that other requests keep getting tokens while "
        "it is computed.",
        "What does chunked prefill do | Why chunk the prefill | How are long prompts handled",
    ),
    Term(
        "prefill | the prefill | prefill phase | prompt processing",
        "is the computation of all tokens of the prompt before the first token of the answer.",
    ),
    Term(
        "decode | decoding | the decode phase | a decode step",
        "is the computation of the answer, one token of each running request a step.",
    ),
    Term(
        "continuous batching | in-flight batching | dynamic batching | batching | iteration-level scheduling",
        "is the change of the batch at every step: requests join and leave as soon as they can, none "
        "waits for another.",
    ),
    Term(
        "preemption | a preempted request | request preemption",
        "is taking the blocks of a request when the KV cache is full; the request is computed again later.",
    ),
    Term(
        "the scheduler | scheduler | a scheduler",
        "is the part of the engine that decides at each step how many tokens of which requests are computed.",
    ),
    Term(
        "the engine | engine | the engine loop",
        "is the loop that schedules a step, runs it on the ranks and hands the tokens to the requests.",
    ),
    Term(
        "a plan | plan | the plan",
        "is what the scheduler sends to the ranks for one step: the rows and their numbers of tokens.",
    ),
    Term(
        "a row | row | rows",
        "is the place of a running sequence in a rank; it keeps its token ids and its block table.",
    ),
    Term(
        "a request | request",
        "is a prompt with its sampling parameters; it gets tokens until it ends.",
    ),
    Term(
        "a sequence | sequence",
        "is the token ids of one request: the prompt and what was generated.",
    ),
    Term(
        "a rank | rank | ranks | rank 0",
        "is one process of a tensor-parallel group; it holds its part of the weights.",
    ),
    Term(
        "tensor parallelism | tensor parallel | TP | tensor-parallel inference | tensor parallelism size",
        "is the splitting of every layer over several ranks, so that they compute it together.",
    ),
    Term(
        "TTFT | the TTFT | time to first token",
        "is the time to first token: from the arrival of a request to its first token.",
        "What does TTFT mean | What does TTFT stand for",
    ),
    Term(
        "ITL | inter-token latency | the ITL | TPOT | time per output token",
        "is the inter-token latency: the time between two tokens of an answer.",
        "What does ITL mean | What does ITL stand for",
    ),
    Term(
        "throughput | the throughput | tokens per second",
        "is the number of tokens that the server generates a second, over all requests.",
    ),
    Term(
        "latency | the latency",
        "is how long a request waits for its tokens; TTFT and ITL measure it.",
    ),
    Term(
        "temperature | the temperature | sampling temperature",
        "is a sampling parameter: 0 always takes the likeliest token, higher values make the answers more random.",
        "What does temperature do | What does the temperature mean",
    ),
    Term(
        "top_p | top p | nucleus sampling | top-p",
        "is a sampling parameter: only the likeliest tokens whose probabilities add up to top_p can be sampled.",
        "What does top_p do",
    ),
    Term(
        "top_k | top k | top-k",
        "is a sampling parameter: only the k likeliest tokens can be sampled.",
        "What does top_k do",
    ),
    Term(
        "min_p | min p | min-p",
        "is a sampling parameter: tokens less likely than min_p times the likeliest one are dropped.",
        "What does min_p do",
    ),
    Term(
        "seed | a seed | the seed",
        "is a number that makes sampling repeatable: the same request with the same seed gets the same tokens.",
        "What does seed do",
    ),
    Term(
        "greedy decoding | greedy sampling | greedy search | temperature 0",
        "is always taking the likeliest token; set temperature to 0 for it.",
        "What does temperature 0 mean",
    ),
    Term(
        "logprobs | log probabilities | logprob | token probabilities | top_logprobs",
        "are the logarithms of the probabilities of the tokens that the model chose, and of their best alternatives.",
        "What does logprobs mean",
    ),
    Term(
        "repetition_penalty | repetition penalty | the repetition penalty",
        "is a sampling parameter: above 1 it makes tokens of the prompt and the answer less likely to come again.",
        "What does repetition_penalty do | How do I avoid repetition",
    ),
    Term(
        "presence_penalty | presence penalty | the presence penalty",
        "is a sampling parameter: it makes every token that is already in the answer less likely, once.",
        "What does presence_penalty do",
    ),
    Term(
        "frequency_penalty | frequency penalty | the frequency penalty",
        "is a sampling parameter: it makes a token less likely each time that it appears in the answer.",
        "What does frequency_penalty do",
    ),
    Term(
        "min_tokens | min tokens",
        "is the least number of tokens of an answer: the model cannot end before it.",
        "What does min_tokens do | How do I set a minimum length",
    ),
    Term(
        "max_tokens | max tokens | max_completion_tokens",
        'is the largest number of tokens of an answer; a longer one is cut, and finish_reason is "length".',
        "What does max_tokens do | How do I limit the length of the answer | How do I make answers "
        "shorter | Why was my answer cut | Why is the answer cut off",
    ),
    Term(
        "a stop string | stop string | stop strings | stop sequences | the stop parameter",
        'is a text that ends the answer when the model writes it; give it in "stop".',
        "How do I stop at a string | How do I use stop strings | What does stop do",
    ),
    Term(
        "finish_reason | finish reason | the finish_reason",
        'is why an answer ended: "stop", "length" or "tool_calls".',
        "What does finish_reason mean | What does finish_reason length mean",
    ),
    Term(
        "streaming | token streaming | server-sent events | SSE",
        "is sending tokens as they are generated, as server-sent events, rather than the whole answer at the end.",
        "What does stream do",
    ),
    Term(
        "return_token_ids | return token ids",
        "is a request field: with true, the answer also has the token ids of the prompt and of the completion.",
        "What does return_token_ids do | How do I get the token ids | How can I get token ids",
    ),
    Term(
        "enable_thinking | thinking mode",
        "is a request field: with false, the model answers at once, without thinking first.",
        "What does enable_thinking do",
    ),
    Term(
        "reasoning_max_tokens | reasoning max tokens | the thinking budget",
        "is a request field: the largest number of tokens that the model may spend on thinking.",
        "What does reasoning_max_tokens do",
    ),
    Term(
        "reasoning_content | reasoning content | the reasoning",
        "is the part of the answer where the model thinks; the answer itself is in content.",
        "What does reasoning_content mean | Where are the thoughts",
    ),
    Term(
        "a reasoning parser | reasoning parser | the reasoning parser",
        "is what splits the thoughts of the model from its answer.",
    ),
    Term(
        "a tool call | tool call | tool calls | tool calling | function calling",
        "is an answer of the model that asks the client to run a function, with its name and arguments as JSON.",
    ),
    Term(
        "a chat template | chat template | the chat template | chat templates",
        "is a Jinja file of the checkpoint that turns messages into one prompt.",
    ),
    Term(
        "a system prompt | system prompt | the system prompt | the system message",
        "is a message before the conversation that tells the model how to behave.",
    ),
    Term(
        "ERNIE-4.5 | ERNIE | ernie 4.5 | ERNIE 4.5",
        "is a family of language models by Baidu, from 0.3 to 424 billion parameters.",
    ),
    Term(
        "PaddlePaddle | Paddle",
        "is the deep learning framework by Baidu; fdserve computes with it.",
    ),
    Term(
        "FastDeploy",
        "is PaddlePaddle's serving toolkit; fdserve has the same flags and request fields.",
    ),
    Term(
        "hypercorn | Hypercorn",
        "is the ASGI server that speaks HTTP for fdserve: hypercorn fdserve.app:app.",
    ),
    Term(
        "safetensors | a safetensors file",
        "is a simple and safe file format for the weights of a model.",
    ),
    Term(
        "a checkpoint | checkpoint | model checkpoint",
        "is a folder with the weights, the configuration and the tokenizer of a model.",
    ),
    Term(
        "bf16 | bfloat16",
        "is a 16-bit floating point format with the range of 32-bit floats and less precision.",
    ),
    Term(
        "attention | self-attention | the attention mechanism",
        "is how a token looks at the tokens before it: a weighted sum of their values.",
    ),
    Term(
        "a transformer | transformer | transformers",
        "is a neural network of layers of attention and MLPs; most language models are transformers.",
    ),
    Term(
        "RoPE | rotary embeddings | rotary position embedding",
        "is the rotary position embedding: queries and keys are rotated by angles that grow with the position.",
    ),
    Term(
        "a mixture of experts | mixture of experts | MoE | an MoE model",
        "is a model where a router sends each token to a few experts out of many, so that less is computed.",
    ),
    Term(
        "HTTP status 429 | 429 | error 429 | a 429 | status 429 | HTTP 429 | code 429 | too many requests",
        "means that the server's queue is full: wait as long as the Retry-After header says, then try again.",
        "What does 429 mean | Why do I get 429 | Why do I get a 429 error | I got a 429 | What does error "
        "429 mean | What does HTTP 429 mean | The server returns 429 | What happens when the queue is "
        "full",
    ),
    Term(
        "HTTP status 400 | 400 | error 400 | a 400 | status 400 | HTTP 400",
        "means that the request is not valid: the error body says which field is wrong.",
        "What does 400 mean | Why do I get 400 | What does error 400 mean | I got a 400 | What does HTTP 400 mean",
    ),
    Term(
        "the health endpoint | /health | health check",
        "is GET /health: it says whether the server is ready.",
        "How do I check the health | How do I know that the server is ready | Is the server ready | How "
        "do I check that the server is up",
    ),
    Term(
        "the metrics endpoint | /metrics | metrics",
        "is GET /metrics: it shows counters and latencies for Prometheus.",
        "How do I see metrics | How do I get metrics | How can I monitor the server | Does fdserve have metrics",
    ),
)
