"""Short texts written for `picollm tokenizer eval`: four kinds of text, and strings that break careless tokenizers."""

from __future__ import annotations

SAMPLES: dict[str, tuple[str, ...]] = {
    "prose": (
        "The ferry left at six, as it had every morning since the bridge was closed. Nobody spoke much. A woman in a "
        "green coat read the same page of her book three times, then gave up and watched the gulls instead.\n",
        "When a kettle boils, the water at the bottom turns to steam first; the bubbles rise, meet cooler water and "
        "collapse. That's the hissing you hear. Once all of the water is hot enough, they reach the top and it's quiet "
        "again, apart from the lid.\n",
        "“You can't be serious,” she said. He wasn't, of course, but he'd have liked her to think so a while longer.\n",
    ),
    "code": (
        "def mean(values: list[float]) -> float:\n"
        '    """Arithmetic mean; 0.0 for an empty list."""\n'
        "    if not values:\n        return 0.0\n"
        "    return sum(values) / len(values)\n",
        "for (size_t i = 0; i < n; ++i) {\n\tif (a[i] != b[i]) {\n\t\treturn -1;  // they differ here\n\t}\n}\n",
        'SELECT name, COUNT(*) AS n\nFROM visits\nWHERE day >= "2024-01-01"\nGROUP BY name\nHAVING n > 3;\n',
        '{"id": 17, "tags": ["a", "b"], "nested": {"ok": true, "ratio": 0.25}}\n',
    ),
    "numbers": (
        "0 1 2 3 4 5 6 7 8 9 10 11 12 100 1000 10000 65536 4294967296\n",
        "3.14159 2.71828 -40.5 1e-9 6.022e23 12,345,678.90 50% 1/3 0x1F 0b1011\n",
        "2024-02-29T23:59:59Z 07:45 192.168.0.1 +49 30 901820 $1,299.00 17 + 25 = 42\n",
    ),
    "other scripts": (
        "Das Wetter in Köln ist schön, und die Straßen sind voll.\n",
        "Сегодня утром шёл снег, и дети играли во дворе.\n",
        "Η θάλασσα ήταν ήρεμη και ο ουρανός καθαρός.\n",
        "今天早上下雪了,孩子们在院子里玩。電車は時間どおりに来ました。\n",
        "오늘 아침에 눈이 와서 아이들이 마당에서 놀았어요.\n",
        "سقط الثلج هذا الصباح ولعب الأطفال في الفناء.\n",
        "הילדים שיחקו בחצר כל הבוקר.\n",
        "आज सुबह बर्फ़ गिरी और बच्चे आँगन में खेले।\n",
        "เช้านี้ฝนตกหนักและถนนว่างเปล่า\n",
    ),
}

NASTY: tuple[str, ...] = (
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\n",
    "\r\n\r\n\r",
    " \t \n \t ",
    "a\u00a0b\u2003c\u3000d\u200be",
    "\x00\x01\x7f",
    "\ufeffBOM",
    "I'll we've DON'T it'S ''s",
    "1234567890.5e-10",
    "٣٤٥ ५६७ ½ Ⅷ ²³",
    "e\u0301 vs é, ﬁ, Å vs Å",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ☃︎",
    "नमस्ते ক্ষ กำ 각 ᄀ",
    "\U0001d4d7\U00020000\U0010ffff\ufffd\ufffe",
    "x" * 300,
    "=" * 200 + "\n" + "-" * 200,
    "<|bos|><|user_start|>hi<|user_end|><|assistant_start|>",
    "< |bos| > <|bos |> <|output_end|><|output_end|>",
    "if (a<b&&c>d) { return !x ?? y; } // 100%\n\t\tfoo();\n",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\temp\\new",
)
