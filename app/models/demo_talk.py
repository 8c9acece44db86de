"""What the demo model understands and says: pure text to text.

Three things are understood, in Chinese and English: being told a name, being asked for
that name, and being asked who one is talking to. Everything else gets an answer that
shows what the conversation holds. The latest name wins.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_QUOTE_CHARS: Final = 40
_READ_CHARS: Final = 2000  # of each message: a name is told early, and regular expressions cost time

_ZH = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_WHAT = r"(?:什么|什麼|甚么|甚麼|啥|谁|誰|哪位|哪个|哪個)"

_ASKS_NAME = re.compile(
    rf"我(?:的(?:名字|姓名)|名字)?(?:到底|究竟|刚才|现在|又)?(?:叫|叫做|是|姓)(?:做|作)?{_WHAT}"
    rf"|{_WHAT}是我的(?:名字|姓名)"
    r"|(?:知道|记得|記得|记住|想起|忘了|说出|告诉我|重复)[^，。？！,.?!]{0,6}我(?:的)?(?:名字|姓名)"
    r"|我(?:的)?(?:名字|姓名)(?:呢|[？?]|是\s*[？?]|$)"
    r"|(?:what(?:'s|’s|s| is| was)|tell me|say|remember|recall|know|repeat|forget|is)"
    r" my (?:full |first )?name\b"
    r"|\bmy name(?: is what)?\s*\?"
    r"|\bwho(?:'m| am|m) i\b|\bwho i am\b"
    r"|what (?:am i called|do you call me|should you call me|name did i)",
    re.IGNORECASE,
)
_ASKS_WHO = re.compile(
    rf"你(?:到底|究竟)?(?:是|叫)(?:个|一个)?(?:{_WHAT}|哪)|你的(?:名字|姓名)|你是(?:不是)?(?:人|真人|机器人|AI|人工智能|GPT|ChatGPT)"
    r"|介绍一下(?:你)?自己|自我介绍|(?:什么|哪个|哪种)模型"
    r"|\bwho(?:'re| are) you\b|\bwhat are you\b|\bwhat(?:'s|’s| is) your name\b|\byour name\s*\?"
    r"|\bare you (?:an? )?(?:ai|bot|robot|human|person|real|gpt|chatgpt|llm|model|demo)\b"
    r"|\b(?:which|what) (?:ai |language )?model\b|\bintroduce yourself\b",
    re.IGNORECASE,
)
_GREETS = re.compile(
    r"^\W*(?:你好|您好|嗨|哈喽|大家好|早上好|晚上好|hello|hi|hey|good (?:morning|evening|afternoon))\W*$",
    re.IGNORECASE,
)

_HINT = re.compile(r"叫|我是|名字|姓名|name|call|I['’]?m |I am |go by|his is ", re.IGNORECASE)
_OPEN = r"[\s:：“”\"'‘’「『《<]*+"  # a word begins with none of them: there is nothing to go back for
# One word of a name; a full stop belongs to it only after a title or an initial.
_WORD = r"(?:(?:Dr|Mr|Mrs|Ms|Prof|St|[A-Z])\.|\w[\w·'’-]*)"
_MORE = rf"(?: (?=[A-Z]){_WORD}){{0,2}}"
_TELLS_ZH = re.compile(
    r"(?:(?:请|可以|就|以后|大家都?)?叫我|(?<!不)我(?:的名字|名字|的姓名)?(?:就叫做?|叫做|叫作|名叫|叫|是叫)"
    rf"|我(?:的)?(?:名字|姓名)(?:就)?(?:是|叫|为))(?:做|作)?{_OPEN}(?P<name>{_WORD}{_MORE})"
)
_REFUSES_ZH = re.compile(r"(?:别|不要|不用|不想|没有?)(?:再)?(?:叫|称呼)我")
# "我是…" is a name only when it looks like one: a Latin word, or a usual family name and
# one or two characters that do not name a trade.
_FAMILY = (
    "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦许何吕施张孔曹严华金魏陶姜戚谢邹章苏潘葛范彭鲁马方俞任袁柳史唐薛雷贺"
    "倪汤罗毕郝邬安常于傅齐康伍余顾孟黄萧尹姚邵汪毛狄戴宋熊董梁杜贾江郭梅林钟徐邱骆高夏蔡田樊胡凌霍万卢莫丁邓洪"
    "石崔龚程陆段侯武刘叶白赖乔谭温庄柴阎连习易廖龙"
)
_AM_ZH = re.compile(
    rf"(?<![不但只就要])我是{_OPEN}(?P<name>[{_FAMILY}小][\u4e00-\u9fff]{{1,2}}|(?=[A-Z]){_WORD}{_MORE})"
    r"(?=$|[\s，。！？、；,.!?;~～）)”」』])"
)
_TRADE_ENDS: Final = "员生师者人手家长的工匠"

_TELLS_EN = re.compile(
    r"(?i:\b(?:my (?:full |first )?name(?:'s|’s| is| was|:)|(?:i am|i'm|i’m|i was) (?:called|named)"
    r"|(?<!not )(?<!n't )call me|i go by))"
    rf"\s{_OPEN}(?P<name>{_WORD}{_MORE})"
)
_AM_EN = re.compile(
    r"(?:\b[Ii](?:'m|’m| am)|\bIm|\b[Tt]his is)\s+"
    rf"(?P<name>(?=[A-Z]){_WORD}{_MORE}|[\u4e00-\u9fff·]{{2,5}}(?=$|[\s，。！,.!]))"
)
_NO_NAME = re.compile(
    r"(?:not|a|an|the|what|who|whom|unknown|secret|none|nothing|important|hard|difficult|very|too|"
    r"of|on|in|so|just|irrelevant|spelled|written|common|rare|long|short|mentioned|private|still|"
    r"also|your|my|their|his|her|its|this|that|back|later|when|tomorrow|tonight|today|if|at|"
    r"maybe|sometime|soon|asap|now|again|by|here|there|sorry|fine|good|ok|okay|well|glad|happy|"
    r"sad|tired|hungry|sure|ready|done|new|lost|looking|trying|working|going|having|using|from|"
    r"chinese|american|english|german|french|japanese|korean|indian|british|canadian|australian|"
    r"european|pronounced|to|and|or|but|for|with|something|anything|everything|i|you|he|she|it|"
    r"we|they|crazy|stupid|names|called|named)",
    re.IGNORECASE,
)
_NO_NAME_ZH = re.compile(
    r"^(?:什|甚|啥|谁|誰|哪|你|您|他|她|它|了|过|過|不|没|沒|着|来|來|的|个|這|这|那|啊|吗|嘛|呢|怎|一[个辆份下声次杯碗]|起来|出|车|外卖|人)"
)
# Where a name that is written on without a pause ends; never before its third character.
_STOPS_ZH = re.compile(
    r"(?<=..)(?:今年|来自|住在|从事|喜欢|想要|想问|想知道|很高兴|高兴|毕业|工作|你|您|我|请|是|在|很|吗|对吗)"
)
_PARTICLES: Final = "呢啊呀哦吧啦哈嘛了噢喔哟"


@dataclass(frozen=True, slots=True)
class Said:
    """The conversation as the demo sees it: what the person said, and how many messages there are.

    ``name`` and ``before`` are what a summary tells of what came before ``texts``: what the
    person is called, and what they said last.
    """

    texts: list[str]
    messages: int
    name: str | None = None
    before: str | None = None


def answer(said: Said) -> str:
    """Return the answer to the last text of ``said``: the same one every time."""
    last = said.texts[-1][:_READ_CHARS] if said.texts else ""
    zh = is_chinese(last)
    told = find_name(last)
    name = told or find_last_name(said.texts[:-1]) or said.name
    if _ASKS_NAME.search(last):
        return _tell_name(name, zh)
    if _ASKS_WHO.search(last):
        return _introduce(told, zh)
    if told:
        return _greet(told, zh)
    if _GREETS.match(last):
        return _greet_back(name, zh)
    return _show(said, zh)


def find_name(text: str) -> str | None:
    """Return the name that ``text`` tells as the speaker's own (the last one), or ``None``."""
    text = text[:_READ_CHARS]
    if not _HINT.search(text):
        return None
    found = [(m.start(), _plausible(m["name"])) for m in _AM_ZH.finditer(text)]
    found += [(m.start(), _trim(m["name"])) for p in (_TELLS_EN, _AM_EN) for m in p.finditer(text)]
    if not _REFUSES_ZH.search(text):
        found += [(m.start(), _trim(m["name"])) for m in _TELLS_ZH.finditer(text)]
    named = [(at, name) for at, name in found if name]
    return max(named, key=lambda pair: pair[0])[1] if named else None


def find_last_name(texts: Sequence[str]) -> str | None:
    """Return the name that was told last."""
    return next(filter(None, map(find_name, reversed(texts))), None)


def is_chinese(text: str) -> bool:
    """Whether there is a Chinese character in ``text``."""
    return bool(_ZH.search(text[:_READ_CHARS]))


def quote(text: str) -> str:
    """Return ``text`` on one line, and the beginning of it if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= _QUOTE_CHARS else line[:_QUOTE_CHARS] + "…"


def _plausible(name: str) -> str | None:
    return None if name[-1] in _TRADE_ENDS else _trim(name)


def _trim(raw: str) -> str | None:
    """Return the name at the beginning of ``raw``, or ``None`` when what stands there is none."""
    return _trim_zh(raw) if _ZH.match(raw) else _trim_latin(_ZH.split(raw, maxsplit=1)[0])


def _trim_zh(raw: str) -> str | None:
    if _NO_NAME_ZH.match(raw):
        return None
    name = re.split(r"[的 ]", raw, maxsplit=1)[0]
    if stop := _STOPS_ZH.search(name):
        name = name[: stop.start()]
    if len(name) > 2:
        name = name.rstrip(_PARTICLES)
    return name.strip("·'’-")[:20] or None


def _trim_latin(raw: str) -> str | None:
    if raw.lower().endswith(("'s", "’s")):
        return None  # Alice's friend is not Alice
    name = raw.strip("·'’-_ ")
    return name[:40] if name and not _NO_NAME.fullmatch(name.split()[0]) else None


def _tell_name(name: str | None, zh: bool) -> str:
    if name is None:
        return "我不知道你的名字，请告诉我。" if zh else "I don't know your name yet. Please tell me."
    return f"你叫{_spaced(name)}。" if zh else f"Your name is {name}."


def _introduce(told: str | None, zh: bool) -> str:
    if zh:
        hello = f"你好{_spaced(told)}！" if told else ""
        return f"{hello}我是 AgentPool 内置的演示模型，不连接网络，只会记住我们这次对话里说过的话。"
    hello = f"Hello, {told}! " if told else ""
    return (
        f"{hello}I am AgentPool's built-in demo model. I use no network; I only remember this conversation."
    )


def _greet(name: str, zh: bool) -> str:
    if zh:
        return f"你好{_spaced(name)}！很高兴认识你，我会记住你的名字。"
    return f"Hello, {name}! Nice to meet you. I will remember your name."


def _greet_back(name: str | None, zh: bool) -> str:
    if zh:
        return f"你好{_spaced(name) if name else ''}！我是演示模型，有什么可以帮你的吗？"
    return f"Hello{', ' + name if name else ''}! I am the demo model. How can I help you?"


def _show(said: Said, zh: bool) -> str:
    last = quote(said.texts[-1]) if said.texts else ""
    before = quote(said.texts[-2]) if len(said.texts) > 1 else said.before
    if zh:
        earlier = f"上一条你说的是“{before}”。" if before else "这是你的第一条消息。"
        return f"我是演示模型，收到了“{last}”。算上这一条，我们的对话共有 {said.messages} 条消息。{earlier}"
    earlier = f"Before that you said “{before}”." if before else "It is your first one."
    count = f"{said.messages} message{'s' if said.messages != 1 else ''}"
    return f"I am the demo model and got “{last}”. With it our conversation has {count} so far. {earlier}"


def _spaced(name: str) -> str:
    """Return ``name`` as it follows a Chinese word: a Latin one stands apart."""
    return name if _ZH.match(name) else f" {name}"
