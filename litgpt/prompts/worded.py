"""Prompt styles that mark turns with words. Each is a layout as published with the models that were tuned on it; `{}` stands for a text."""

from litgpt.prompts.style import Message, Piece, PromptStyle

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n",
)
META = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your answers should "
    "not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your responses are "
    "socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why "
    "instead of answering something not correct. If you don't know the answer to a question, please don't share false information."
)


class Framed(PromptStyle):
    """A layout that writes something around what the assistant says, as the space that makes its first word an ordinary one."""

    answer = " {}"  # from where a served prompt ends to the token that ends the answer

    def pieces(self, messages: list[Message], end: str | None = None) -> list[Piece]:
        """Return the text of a conversation in pieces; what stands around an answer is trained on too."""
        end = (self.end or "") if end is None else end
        frame = self.answer if self.end in (None, end) else self.answer.rstrip()  # what leads up to another token is left out
        pieces = super().pieces(messages, end)
        return [
            piece._replace(text=frame.replace("{}", piece.text[: len(piece.text) - len(end)], 1) + end) if piece.trained else piece
            for piece in pieces
        ]


class Default(PromptStyle, name="default"):
    """Only the text itself, for models that were not trained on instructions."""

    between = "\n"


class FLAN(PromptStyle, name="flan"):
    """Alpaca's layout for instructions without an input."""

    default_system = ALPACA[0]
    system = "{}"
    system_inside = False
    user = "### Instruction:\n{}\n\n### Response:\n"
    between = "\n\n"


class Longform(FLAN, name="longform"):
    """Alpaca's layout with the preamble for instructions that have an input, but no place for one."""

    default_system = ALPACA[1]


class Alpaca(FLAN, name="alpaca"):
    """Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca; a system text replaces its preamble."""

    default_system = None

    def turn(self, message: Message, system: str | None, first: bool) -> str:
        """Return one instruction, with its input if there is one."""
        given = message.get("input")
        preamble = (ALPACA[bool(given)] if system is None else system) if first else ""
        text = f"{message['content']}\n\n### Input:\n{given}" if given else message["content"]
        return preamble + self.user.replace("{}", text, 1)


class FreeWilly2(PromptStyle, name="freewilly2"):
    """FreeWilly 2 (Stable Beluga 2), https://huggingface.co/stabilityai/StableBeluga2."""

    default_system = "This is a system prompt, please behave and help the user."
    system = "### System:\n{}\n\n"
    system_inside = False
    user = "### User:\n{}\n\n### Assistant:\n"
    between = "\n\n"


class Platypus(PromptStyle, name="platypus"):
    """Platypus 2, https://huggingface.co/garage-bAInd/Platypus2-13B."""

    user = "### Instruction:\n\n{}\n\n### Response:\n"
    between = "\n\n"


class StableCode(PromptStyle, name="stablecode"):
    """StableCode instruct alpha, https://huggingface.co/stabilityai/stablecode-instruct-alpha-3b."""

    user = "###Instruction\n{}###Response\n"
    between = "\n"


class Phi1(Framed, name="phi-1"):
    """Phi 1 and 1.5, https://huggingface.co/microsoft/phi-1_5."""

    user = "{}\n\nAnswer:"
    between = "\n\n"
    stops = (("Answer", ":"), ("\n", "Answer", ":"))


class Phi2(Framed, name="phi-2"):
    """Phi 2, https://huggingface.co/microsoft/phi-2."""

    user = "Instruct: {}\nOutput:"
    between = "\n"


class Falcon(Framed, name="falcon"):
    """Falcon instruct; its first models have no tokens for turns."""

    user = "{}\nAnswer:"
    between = "\n"
    stops = (("User", ":"), ("\n", "User"))


class Llama2(Framed, name="llama2"):
    """Llama 2 chat, https://huggingface.co/blog/llama2#how-to-prompt-llama-2."""

    default_system = META
    system = "<<SYS>>\n{}\n<</SYS>>\n\n "
    user = "[INST] {} [/INST] "
    answer = "{} "
    between = "<s>"  # every turn is a text of its own


class Llama2FunctionCalling(PromptStyle, name="llama2-function-calling"):
    """Trelis' Llama 2 with functions, https://huggingface.co/Trelis/Llama-2-7b-chat-hf-function-calling-v2, with one example function."""

    begin = (
        '<FUNCTIONS>{\n    "function": "search_bing",\n    "description": "Search the web for content on Bing. This allows users to search '
        'online/the internet/the web for content.",\n    "arguments": [\n        {\n            "name": "query",\n            '
        '"type": "string",\n            "description": "The search query string"\n        }\n    ]\n}</FUNCTIONS>\n\n'
    )
    default_system = META
    system = "<<SYS>>\n{}\n<</SYS>>\n\n"
    user = "[INST]{}[/INST]\n\n"


class CodeLlama(Framed, name="codellama"):
    """Code Llama instruct up to 34B, https://huggingface.co/blog/codellama#conversational-instructions."""

    system = "<<SYS>>\n{}\n<</SYS>>\n\n"
    user = "[INST] {} [/INST]"
    answer = " {} "
    between = "<s>"


class CodeLlama70B(Framed, name="codellama-70b"):
    """Code Llama 70B instruct, https://huggingface.co/codellama/CodeLlama-70b-Instruct-hf; each answer is written as the newest one is."""

    system = "Source: system\n\n {} <step> "
    system_inside = False
    user = "Source: user\n\n {} <step> Source: assistant\nDestination: user\n\n "
    answer = "{} "
    end = "<step>"
    between = " "


class Mistral(Framed, name="mistral"):
    """Mistral 7B instruct 0.1 and 0.2 and Mixtral 8x7B, https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.2."""

    user = "[INST] {} [/INST]"
    between = " "


class MistralV3(Framed, name="mistral-v3"):
    """Mistral 7B instruct 0.3 and Mixtral 8x22B, whose marks are tokens, https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.3."""

    user = "[INST] {}[/INST]"


class MistralTekken(PromptStyle, name="mistral-tekken"):
    """Mistral Nemo and Ministral, https://huggingface.co/mistralai/Mistral-Nemo-Instruct-2407."""

    user = "[INST]{}[/INST]"


class MistralV7(MistralV3, name="mistral-v7"):
    """Mistral Large 2411, https://huggingface.co/mistralai/Mistral-Large-Instruct-2411."""

    system = "[SYSTEM_PROMPT] {}[/SYSTEM_PROMPT]"
    system_inside = False


class MistralV7Tekken(MistralTekken, name="mistral-v7-tekken"):
    """Mistral Small 3, https://huggingface.co/mistralai/Mistral-Small-24B-Instruct-2501."""

    system = "[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]"
    system_inside = False


class Falcon180BChat(Framed, name="falcon-180b-chat"):
    """Falcon 180B chat, https://huggingface.co/tiiuae/falcon-180B-chat."""

    system = "System: {}\n"
    system_inside = False
    user = "User: {}\nFalcon:"
    between = "\n"
    stops = (("User", ":"), ("\n", "User"))


class Vicuna(Framed, name="vicuna"):
    """Vicuna 1.1 to 1.5, https://github.com/lm-sys/FastChat/blob/main/docs/vicuna_weights_version.md."""

    default_system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    system = "{} "
    system_inside = False
    user = "USER: {} ASSISTANT:"


class LongChat(Vicuna, name="longchat"):
    """LongChat, tuned as Vicuna was, https://huggingface.co/lmsys/longchat-7b-16k."""


class TogetherComputerChat(Framed, name="togethercomputer-chat"):
    """RedPajama-INCITE chat, https://huggingface.co/togethercomputer/RedPajama-INCITE-7B-Chat."""

    user = "<human>: {}\n<bot>:"
    between = "\n"
    stops = (("<", "human", ">:"), ("<", "bot", ">:"))


class TogetherComputerInstruct(Framed, name="togethercomputer-instruct"):
    """RedPajama-INCITE instruct, for questions after examples, https://huggingface.co/togethercomputer/RedPajama-INCITE-7B-Instruct."""

    system_inside = False
    user = "Q: {}\nA:"
    between = "\n"
    stops = (("Q", ":"), ("Question",), ("A", ":"), ("Label", ":"), ("\n", "\n"), ("\n\n",))


class NousResearch(PromptStyle, name="nous-research"):
    """Nous Hermes, https://huggingface.co/NousResearch/Nous-Hermes-Llama2-13b: Alpaca's layout without its preamble."""

    system = "{}\n\n"
    system_inside = False
    user = "### Instruction:\n{}\n\n### Response:\n"
    between = "\n\n"

    def turn(self, message: Message, system: str | None, first: bool) -> str:
        """Return one instruction, with its input if there is one."""
        return super().turn(_with_input(message, "### Input:"), system, first)


class Dolly(Framed, name="dolly"):
    """Databricks' Dolly v2, https://huggingface.co/databricks/dolly-v2-12b; the words that end an answer are one token of its own."""

    default_system = ALPACA[0].rstrip()
    system = "{}\n\n"
    system_inside = False
    user = "### Instruction:\n{}\n\n### Response:\n"
    answer = "{}\n\n"
    end = "### End"
    between = "\n\n"

    def turn(self, message: Message, system: str | None, first: bool) -> str:
        """Return one instruction, with its input if there is one."""
        return super().turn(_with_input(message, "Input:"), system, first)


def _with_input(message: Message, title: str) -> Message:
    """Return a message whose text has the input of an instruction under a title."""
    given = message.get("input")
    return {"role": message["role"], "content": f"{message['content']}\n\n{title}\n{given}" if given else message["content"]}
