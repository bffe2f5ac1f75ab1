"""The prompt styles. Each is a layout, as published with the models that were trained on it; `{}` stands for a text."""

from litgpt.prompts.style import Message, PromptStyle, prompt_styles

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n",
)
HELPFUL = "You are a helpful assistant."
META = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your answers should "
    "not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your responses are "
    "socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why "
    "instead of answering something not correct. If you don't know the answer to a question, please don't share false information."
)


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


class StableLMAlpha(PromptStyle, name="stablelm-alpha"):
    """StableLM tuned alpha, https://github.com/Stability-AI/StableLM."""

    default_system = (
        "# StableLM Tuned (Alpha version)\n"
        "- StableLM is a helpful and harmless open-source AI language model developed by StabilityAI.\n"
        "- StableLM is excited to be able to help the user, but will refuse to do anything that could be considered harmful to the user.\n"
        "- StableLM is more than just an information source, StableLM is also able to write poetry, short stories, and make jokes.\n"
        "- StableLM will refuse to participate in anything that could harm a human.\n"
    )
    system = "<|SYSTEM|>{}"
    system_inside = False
    user = "<|USER|>{}<|ASSISTANT|>"
    stops = ("<|SYSTEM|>", "<|ASSISTANT|>", "<|USER|>")


class StableLMZephyr(PromptStyle, name="stablelm-zephyr"):
    """StableLM Zephyr, https://huggingface.co/stabilityai/stablelm-zephyr-3b."""

    system = "<|system|>\n{}<|endoftext|>\n"
    system_inside = False
    user = "<|user|>\n{}<|endoftext|>\n<|assistant|>\n"
    end = "<|endoftext|>"
    between = "\n"


class Falcon(PromptStyle, name="falcon"):
    """Falcon instruct; its first models have no tokens for turns."""

    user = "{}\nAnswer:"
    between = "\n"
    stops = (("User", ":"), ("\n", "User"))


class Falcon3(StableLMZephyr, name="falcon3"):
    """Falcon 3 instruct."""


class Llama2(PromptStyle, name="llama2"):
    """Llama 2 chat, https://huggingface.co/blog/llama2#how-to-prompt-llama-2."""

    default_system = META
    system = "<<SYS>>\n{}\n<</SYS>>\n\n "
    user = "[INST] {} [/INST] "


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


class Llama3(PromptStyle, name="llama3"):
    """Llama 3, https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/."""

    begin = "<|begin_of_text|>"
    default_system = HELPFUL
    system = "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>"
    system_inside = False
    user = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    end = "<|eot_id|>"


class R1Base(PromptStyle, name="r1base"):
    """DeepSeek R1 and what was distilled from it."""

    system = "{}"
    system_inside = False
    user = "<｜User｜>{}<｜Assistant｜>"
    end = "<｜end▁of▁sentence｜>"


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


class CodeLlama(PromptStyle, name="codellama"):
    """Code Llama, and Mistral's first models."""

    system = "<<SYS>>\n{}\n<</SYS>>\n\n"
    user = "[INST] {} [/INST]"


class Phi1(PromptStyle, name="phi-1"):
    """Phi 1 and 1.5, https://huggingface.co/microsoft/phi-1_5."""

    user = "{}\n\nAnswer:"
    between = "\n\n"
    stops = (("Answer", ":"), ("\n", "Answer", ":"))


class Phi2(PromptStyle, name="phi-2"):
    """Phi 2, https://huggingface.co/microsoft/phi-2."""

    user = "Instruct: {}\nOutput:"
    between = "\n"


class Phi3(PromptStyle, name="phi-3"):
    """Phi 3, https://huggingface.co/microsoft/Phi-3-mini-4k-instruct."""

    default_system = HELPFUL
    system = "<|system|>\n{}<|end|>\n"
    system_inside = False
    user = "<|user|>\n{}<|end|>\n<|assistant|>\n"
    end = "<|end|>"
    between = "\n"


class Phi4(PromptStyle, name="phi-4"):
    """Phi 4, https://huggingface.co/microsoft/phi-4."""

    system = "<|im_start|>system<|im_sep|>{}<|im_end|>"
    system_inside = False
    user = "<|im_start|>user<|im_sep|>{}<|im_end|><|im_start|>assistant<|im_sep|>"
    end = "<|im_end|>"


class Phi4Reasoning(Phi4, name="phi-4-reasoning"):
    """Phi 4 reasoning, https://huggingface.co/microsoft/Phi-4-reasoning."""

    default_system = (
        "You are Phi, a language model trained by Microsoft to help users. Your role as an assistant involves thoroughly exploring "
        "questions through a systematic thinking process before providing the final precise and accurate solutions. This requires engaging "
        "in a comprehensive cycle of analysis, summarizing, exploration, reassessment, reflection, backtracing, and iteration to develop "
        "well-considered thinking process. Please structure your response into two main sections: Thought and Solution using the specified "
        "format: <think> {Thought section} </think> {Solution section}. In the Thought section, detail your reasoning process in steps. "
        "Each step should include detailed considerations such as analysing questions, summarizing relevant findings, brainstorming new "
        "ideas, verifying the accuracy of the current steps, refining any errors, and revisiting previous steps. In the Solution section, "
        "based on various attempts, explorations, and reflections from the Thought section, systematically present the final solution that "
        "you deem correct. The Solution section should be logical, accurate, and concise and detail necessary steps needed to reach the "
        "conclusion. Now, try to solve the following question through the above guidelines:"
    )


class Phi4Mini(PromptStyle, name="phi-4-mini"):
    """Phi 4 mini, https://huggingface.co/microsoft/Phi-4-mini-instruct."""

    system = "<|system|>{}<|end|>"
    system_inside = False
    user = "<|user|>{}<|end|><|assistant|>"
    end = "<|end|>"


class Phi4MiniReasoning(Phi4Mini, name="phi-4-mini-reasoning"):
    """Phi 4 mini reasoning, https://huggingface.co/microsoft/Phi-4-mini-reasoning."""

    default_system = "Your name is Phi, an AI math expert developed by Microsoft."


class TinyLlama(PromptStyle, name="tinyllama"):
    """TinyLlama chat, https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0."""

    default_system = "You are a friendly chatbot who always gives helpful, detailed, and polite answers."
    system = "<|system|>\n{}</s>\n"
    system_inside = False
    user = "<|user|>\n{}</s>\n<|assistant|>\n"
    end = "</s>"
    between = "\n"


class Gemma(PromptStyle, name="gemma"):
    """Gemma, https://ai.google.dev/gemma/docs/core/prompt-structure; it has no system role, so that text opens the first user turn."""

    user = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    end = "<end_of_turn>"
    between = "\n"


class OLMo(PromptStyle, name="olmo"):
    """OLMo instruct, https://huggingface.co/allenai/OLMo-7B-Instruct-hf."""

    begin = "<|endoftext|>"
    system = "<|system|>\n{}\n"
    system_inside = False
    user = "<|user|>\n{}\n<|assistant|>\n"
    end = "<|endoftext|>"
    between = "\n"


class ChatML(PromptStyle, name="chatml"):
    """ChatML, the layout of many models."""

    system = "<|im_start|>system\n{}<|im_end|>\n"
    system_inside = False
    user = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    end = "<|im_end|>"
    between = "\n"


class Qwen2_5(ChatML, name="qwen2.5"):
    """Qwen 2.5."""

    default_system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class Qwen2_5_Math(ChatML, name="qwen2.5-math"):
    """Qwen 2.5 Math."""

    default_system = "Please reason step by step, and put your final answer within \\boxed{}."


class QwQ(ChatML, name="qwq"):
    """QwQ."""

    default_system = "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step."


class Qwen3(ChatML, name="qwen3"):
    """Qwen 3, which has no default system text."""


class SmolLM2(ChatML, name="smollm2"):
    """SmolLM2."""

    default_system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class Salamandra(ChatML, name="salamandra"):
    """Salamandra, https://huggingface.co/BSC-LT/salamandra-7b-instruct."""

    default_system = (
        "I am Salamandra, an AI language model developed at the Barcelona Supercomputing Centre (BSC) by the Language Technologies Unit. "
        "My knowledge base was last updated on August 2023. Today Date: 2024-09-30\n"
        "Soy Salamandra, un modelo lingüístico de IA desarrollado en el Barcelona Supercomputing Centre (BSC) por la Language "
        "Technologies Unit. Mi base de conocimientos se actualizó por última vez en agosto de 2023.\n"
        "Soc Salamandra, un model de llenguatge d'IA desenvolupat al Barcelona Supercomputing Centre (BSC) per la Language "
        "Technologies Unit. La meva base de coneixement es va actualitzar per última vegada l'agost de 2023."
    )


prompt_styles["r1"] = R1Base
