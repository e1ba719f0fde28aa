"""The words that stand before answers and questions, by language: data, no rules.

Lead-ins are those of MGSM's worked examples (Shi et al. 2022, https://arxiv.org/abs/2210.03057) and of
lm-evaluation-harness' ``mgsm`` and ``gsm8k`` filters, with the forms that instruction-tuned models use beside them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AnswerWords:
    """Regular expressions, matched without regard to case.

    Attributes:
        states: a clause that the answer ends: ``the answer is``.
        heads: nouns that a colon follows: ``Answer:``.
        direct: nouns that the answer follows with no verb between: Telugu ``సమాధానం 11``.
        questions: literal words that a colon follows where a new question begins.
        spaces: whether the language puts spaces between words.
    """

    states: str
    heads: str
    questions: tuple[str, ...]
    direct: str = ""
    spaces: bool = True


ANSWER_WORDS = {
    "en": AnswerWords(
        r"answer (?:is|equals|would be|must be|will be)", r"answer", ("Question", "Problem", "Q", "Exercise")
    ),
    "de": AnswerWords(
        r"(?:antwort|ergebnis) (?:ist|lautet|beträgt)", r"antwort|ergebnis|lösung", ("Frage", "Aufgabe")
    ),
    "es": AnswerWords(
        r"(?:respuesta|resultado)(?: final| correcta)? es(?: de)?", r"respuesta", ("Pregunta", "Problema")
    ),
    "fr": AnswerWords(
        r"(?:réponse|résultat)(?: finale?| correcte)? est(?: de)?", r"réponse", ("Question", "Problème")
    ),
    "pt": AnswerWords(r"resposta(?: final| correta)? é(?: de)?", r"resposta", ("Pergunta", "Problema")),
    "it": AnswerWords(r"risposta(?: finale| corretta)? è", r"risposta", ("Domanda", "Problema")),
    "ru": AnswerWords(
        r"ответ(?:ом)?(?:\s?[-—]| является| будет| равен)", r"ответ", ("Задача", "Вопрос", "Задание")
    ),
    "zh": AnswerWords(
        r"答案(?:是|为|為|等于|等於)|答案就是", r"答案|答", ("问题", "問題", "题目", "題目"), spaces=False
    ),
    "ja": AnswerWords(
        r"答え?(?:は|が)|(?:解答|正解)は", r"答え|解答|回答", ("問題", "質問", "問"), spaces=False
    ),
    "th": AnswerWords(
        r"คำตอบ(?:สุดท้าย|ที่ถูกต้อง)?\s?(?:คือ|เป็น|เท่ากับ)", r"คำตอบ|ตอบ", ("โจทย์", "คำถาม"), spaces=False
    ),
    "sw": AnswerWords(r"jibu (?:la mwisho |sahihi )?ni", r"jibu", ("Swali",)),
    "bn": AnswerWords(r"উত্তর (?:হল|হলো|হচ্ছে|হবে)|উত্তরটি (?:হল|হলো)", r"উত্তর", ("প্রশ্ন",)),
    "te": AnswerWords(r"సమాధానం (?:ఏమిటంటే|అంటే)", r"సమాధానం|జవాబు", ("ప్రశ్న",), direct=r"సమాధానం|జవాబు"),
    "ar": AnswerWords(
        r"(?:الإجابة|الاجابة|الجواب)(?: النهائية| النهائي| الصحيحة)? (?:هي|هو)",
        r"الإجابة|الاجابة|الجواب|إجابة|جواب",
        ("السؤال", "سؤال", "المسألة", "مسألة"),
    ),
    "hi": AnswerWords(
        r"(?:उत्तर|जवाब) (?:है|होगा)", r"उत्तर|जवाब", ("प्रश्न", "सवाल", "समस्या"), direct=r"उत्तर|जवाब"
    ),
    "vi": AnswerWords(
        r"(?:câu trả lời|đáp án|đáp số|kết quả)(?: cuối cùng| đúng)? là",
        r"câu trả lời|đáp án|đáp số|trả lời|kết quả",
        ("Câu hỏi", "Bài toán", "Đề bài"),
    ),
    "tr": AnswerWords(
        r"(?:cevap|yanıt|sonuç) (?:olarak|ise|şudur)",
        r"cevap|yanıt|sonuç",
        ("Soru", "Problem"),
        direct=r"cevap|yanıt|sonuç",
    ),
    "id": AnswerWords(
        r"jawaban(?:nya)?(?: akhir(?:nya)?| yang benar)? adalah",
        r"jawaban(?: akhir)?|jawab",
        ("Pertanyaan", "Soal"),
    ),
}

TURNS = ("User:", "Human:", "### Instruction", "### Question", "### Input")
"""What begins a new turn at the start of a line, in common prompt formats."""

TURN_TOKENS = (
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end|>",
        "<|user|>",
        "<|assistant|>",
    ),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "</s>", "<eos>"),
)
"""Control tokens of common chat formats, written out as text by a model that knows them as text only."""
