"""Prompt styles that mark turns with tokens. Each is a layout as published with models that were tuned on it; `{}` stands for a text."""

from litgpt.prompts.style import PromptStyle, prompt_styles

HELPFUL = "You are a helpful assistant."


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


class StableLM2Zephyr(StableLMZephyr, name="stablelm2-zephyr"):
    """StableLM 2 Zephyr, https://huggingface.co/stabilityai/stablelm-2-zephyr-1_6b."""


class Falcon3(StableLMZephyr, name="falcon3"):
    """Falcon 3 instruct."""


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


class Tulu(PromptStyle, name="tulu"):
    """Tulu 2 and 3, https://huggingface.co/allenai/tulu-2-7b; an answer ends with EOS."""

    system = "<|system|>\n{}\n"
    system_inside = False
    user = "<|user|>\n{}\n<|assistant|>\n"
    between = "\n"


class OLMo(Tulu, name="olmo"):
    """OLMo instruct, https://huggingface.co/allenai/OLMo-7B-Instruct-hf."""

    begin = "<|endoftext|>"
    end = "<|endoftext|>"


class OLMo2(OLMo, name="olmo2"):
    """OLMo 2 instruct, https://huggingface.co/allenai/OLMo-2-1124-7B-Instruct."""


class H2OAI(PromptStyle, name="h2oai"):
    """H2O Danube 2 chat, https://huggingface.co/h2oai/h2o-danube2-1.8b-chat; it has no system role, so that text opens the first turn."""

    user = "<|prompt|>{}</s><|answer|>"
    end = "</s>"


class Granite(PromptStyle, name="granite"):
    """Granite 3 instruct, https://huggingface.co/ibm-granite/granite-3.0-8b-instruct."""

    system = "<|start_of_role|>system<|end_of_role|>{}<|end_of_text|>\n"
    system_inside = False
    user = "<|start_of_role|>user<|end_of_role|>{}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
    end = "<|end_of_text|>"
    between = "\n"


class CommandR(PromptStyle, name="command-r"):
    """Cohere's Command R and Aya, https://huggingface.co/CohereLabs/c4ai-command-r-v01."""

    system = "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{}<|END_OF_TURN_TOKEN|>"
    system_inside = False
    user = "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    end = "<|END_OF_TURN_TOKEN|>"


class ChatML(PromptStyle, name="chatml"):
    """ChatML, the layout of many models."""

    system = "<|im_start|>system\n{}<|im_end|>\n"
    system_inside = False
    user = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    end = "<|im_end|>"
    between = "\n"


class StableLM2Chat(ChatML, name="stablelm2-chat"):
    """StableLM 2 chat, https://huggingface.co/stabilityai/stablelm-2-12b-chat."""


class Qwen2(ChatML, name="qwen2"):
    """Qwen 2, https://huggingface.co/Qwen/Qwen2-7B-Instruct."""

    default_system = HELPFUL


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
