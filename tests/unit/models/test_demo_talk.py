"""The demo model's conversation: names, itself, and what it shows of the rest."""

import time

import pytest

from app.models.demo_talk import Said, answer, find_name


def talk(*texts: str) -> str:
    """Return the answer to the last of ``texts``, all said by one person."""
    return answer(Said(list(texts), 2 * len(texts) - 1))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("我叫张三", "张三"),
        ("你好，我叫张三", "张三"),
        ("你好，我叫 Alice", "Alice"),
        ("我叫Bob，今年20岁", "Bob"),
        ("我叫李雷今年18岁", "李雷"),
        ("我的名字是王小明。", "王小明"),
        ("我的名字叫欧阳娜娜", "欧阳娜娜"),
        ("我叫张三的朋友很多", "张三"),
        ("我叫张三，你呢？", "张三"),
        ("我叫用户123", "用户123"),
        ("我叫user_42。", "user_42"),
        ("我叫：“李四”", "李四"),
        ("我不是张三，我叫李四", "李四"),
        ("请叫我小红", "小红"),
        ("你好，我是小明", "小明"),
        ("我叫张和平", "张和平"),
        ("My name is Alice", "Alice"),
        ("my name is alice and I like tea", "alice"),
        ("Hi, I'm Alice, nice to meet you", "Alice"),
        ("I am Bob Smith.", "Bob Smith"),
        ("I am called Zoë", "Zoë"),
        ("Call me Bob", "Bob"),
        ("My name's O'Brien", "O'Brien"),
        ("I'm not Alice, I'm Bob", "Bob"),
        ("Hello! I'm Dr. Smith", "Dr. Smith"),
        ("My name is 张三", "张三"),
    ],
)
def test_a_name_is_understood(text: str, name: str) -> None:
    """Who tells a name, in either language or both, is called by it afterwards."""
    assert find_name(text) == name
    assert name in talk(text, "What is my name?")
    assert name in talk(text, "我叫什么名字？")


@pytest.mark.parametrize(
    "text",
    [
        "我叫什么",
        "我叫什么名字？",
        "我是谁？",
        "我叫不出来",
        "我叫了外卖",
        "我不叫张三",
        "别叫我阿强",
        "我是程序员",
        "我是学生",
        "My name is not important",
        "What is my name?",
        "Who am I?",
        "call me back later",
        "i'm tired",
        "I'm Sorry",
        "I'm Alice's friend",
        "",
        "？！",
    ],
)
def test_what_is_no_name_is_not_taken_for_one(text: str) -> None:
    """A question, a trade, a refusal or a mood is not a name."""
    assert find_name(text) is None
    assert talk(text, "我叫什么？") == "我不知道你的名字，请告诉我。"


@pytest.mark.parametrize(
    "question", ["我叫什么名字？", "我叫什么？", "我是谁？", "你知道我是谁吗？", "你还记得我的名字吗"]
)
def test_chinese_questions_for_the_name(question: str) -> None:
    """However one asks in Chinese, a known name is in the answer and an unknown one is admitted."""
    assert talk("你好，我叫张三", question) == "你叫张三。"
    assert talk(question) == "我不知道你的名字，请告诉我。"


@pytest.mark.parametrize(
    "question", ["What is my name?", "Who am I?", "what's my name", "Do you remember my name?"]
)
def test_english_questions_for_the_name(question: str) -> None:
    """However one asks in English, a known name is in the answer and an unknown one is admitted."""
    assert talk("My name is Alice", question) == "Your name is Alice."
    assert talk(question).startswith("I don't know your name")


def test_the_conversation_of_the_seed_document() -> None:
    """Two users of the document on isolation: one is greeted and remembered, the other unknown."""
    assert talk("你好，我叫张三").startswith("你好张三！")
    assert "张三" in talk("你好，我叫张三", "我叫什么名字？")
    assert talk("我是谁？") == "我不知道你的名字，请告诉我。"


def test_the_latest_name_wins() -> None:
    """Who is renamed is called by the new name."""
    assert talk("我叫张三", "我叫李四", "我叫什么？") == "你叫李四。"
    assert talk("I'm Alice", "Please call me Al", "Who am I?") == "Your name is Al."


def test_a_name_and_a_question_in_one_message() -> None:
    """A name told in the question itself is used."""
    assert talk("我叫张三，我叫什么？") == "你叫张三。"


@pytest.mark.parametrize("question", ["你是谁？", "你叫什么名字", "你是什么模型？", "介绍一下你自己"])
def test_it_says_in_chinese_that_it_is_a_demo(question: str) -> None:
    """Asked who it is, it says so."""
    assert "演示模型" in talk(question)


@pytest.mark.parametrize(
    "question", ["Who are you?", "What are you?", "Which model are you", "Are you a bot?"]
)
def test_it_says_in_english_that_it_is_a_demo(question: str) -> None:
    """Asked who it is, it says so."""
    assert "demo model" in talk(question)


def test_other_talk_shows_what_the_conversation_holds() -> None:
    """How many messages there are and which came before can be seen in the answer."""
    assert "3 messages" in talk("first", "second")
    assert "“first”" in talk("first", "second")
    assert "3 条消息" in talk("天气如何", "讲个笑话")
    assert "“天气如何”" in talk("天气如何", "讲个笑话")


def test_an_answer_to_a_long_message_is_short() -> None:
    """A message of 100,000 characters is quoted by its beginning."""
    assert len(talk("长" * 100_000)) < 200


@pytest.mark.parametrize(
    "text", ["my name is" + " " * 1989 + "!", "call me" + "\t“" * 999, "我叫" + "“" * 1999, "我是A我是" * 400]
)
def test_no_message_takes_long(text: str) -> None:
    """All that was said before is read again, so a message that begins to tell a name must be cheap."""
    began = time.process_time()
    talk(*[text] * 20)
    assert time.process_time() - began < 0.3
