"""The small closed world that nano knows: true, timeless facts, and the words its other skills are built from."""

from __future__ import annotations

from dataclasses import dataclass

Word = tuple[str, str]
"""The same thing in English and in Chinese."""


@dataclass(frozen=True)
class Relation:
    """Facts of one form: questions and an answer with `{x}` and `{y}`, and the pairs that make them true.

    Each field of wording is (English, Chinese). `options` are further wrong answers for multiple choice.
    """

    name: str
    subject: str
    questions: tuple[tuple[str, ...], tuple[str, ...]]
    answer: Word
    pairs: tuple[tuple[Word, Word], ...]
    options: tuple[Word, ...] = ()


def _pairs(*rows: str) -> tuple[tuple[Word, Word], ...]:
    """Rows of 'x en|x zh|y en|y zh'."""
    cells = [row.split("|") for row in rows]
    return tuple(((a, b), (c, d)) for a, b, c, d in cells)


CAPITALS = _pairs(
    "France|法国|Paris|巴黎", "Japan|日本|Tokyo|东京", "China|中国|Beijing|北京", "Italy|意大利|Rome|罗马",
    "Germany|德国|Berlin|柏林", "Spain|西班牙|Madrid|马德里", "Egypt|埃及|Cairo|开罗", "Russia|俄罗斯|Moscow|莫斯科",
    "Greece|希腊|Athens|雅典", "Canada|加拿大|Ottawa|渥太华", "Cuba|古巴|Havana|哈瓦那",
    "Kenya|肯尼亚|Nairobi|内罗毕", "Peru|秘鲁|Lima|利马", "Norway|挪威|Oslo|奥斯陆", "Poland|波兰|Warsaw|华沙",
    "Austria|奥地利|Vienna|维也纳",
)  # fmt: skip

ANIMALS = _pairs(
    "a dog|狗|a mammal|哺乳动物", "a horse|马|a mammal|哺乳动物", "a whale|鲸|a mammal|哺乳动物",
    "a bat|蝙蝠|a mammal|哺乳动物", "an eagle|鹰|a bird|鸟", "a penguin|企鹅|a bird|鸟", "an owl|猫头鹰|a bird|鸟",
    "a duck|鸭子|a bird|鸟", "a shark|鲨鱼|a fish|鱼", "a salmon|三文鱼|a fish|鱼", "a carp|鲤鱼|a fish|鱼",
    "an ant|蚂蚁|an insect|昆虫", "a bee|蜜蜂|an insect|昆虫", "a butterfly|蝴蝶|an insect|昆虫",
    "a snake|蛇|a reptile|爬行动物", "a turtle|乌龟|a reptile|爬行动物", "a lizard|蜥蜴|a reptile|爬行动物",
)  # fmt: skip

COLOURS = _pairs(
    "a banana|香蕉|yellow|黄色", "grass|草|green|绿色", "snow|雪|white|白色", "coal|煤|black|黑色",
    "the clear sky|晴朗的天空|blue|蓝色", "blood|血|red|红色", "a ripe lemon|熟柠檬|yellow|黄色",
    "a carrot|胡萝卜|orange|橙色", "milk|牛奶|white|白色", "a ripe tomato|熟番茄|red|红色",
    "chocolate|巧克力|brown|棕色", "an elephant|大象|grey|灰色",
)  # fmt: skip

OPPOSITES = _pairs(
    "hot|热|cold|冷", "big|大|small|小", "tall|高|short|矮", "fast|快|slow|慢", "new|新|old|旧", "light|亮|dark|暗",
    "happy|开心|sad|难过", "open|开|closed|关", "early|早|late|晚", "full|满|empty|空", "clean|干净|dirty|脏",
    "strong|强|weak|弱", "near|近|far|远", "hard|硬|soft|软",
)  # fmt: skip

MONTHS: tuple[Word, ...] = (
    ("January", "一月"), ("February", "二月"), ("March", "三月"), ("April", "四月"), ("May", "五月"),
    ("June", "六月"), ("July", "七月"), ("August", "八月"), ("September", "九月"), ("October", "十月"),
    ("November", "十一月"), ("December", "十二月"),
)  # fmt: skip

DAYS: tuple[Word, ...] = (
    ("Monday", "星期一"), ("Tuesday", "星期二"), ("Wednesday", "星期三"), ("Thursday", "星期四"),
    ("Friday", "星期五"), ("Saturday", "星期六"), ("Sunday", "星期日"),
)  # fmt: skip

LEGS = _pairs(
    "a spider|蜘蛛|eight|八", "an ant|蚂蚁|six|六", "a bee|蜜蜂|six|六", "a cat|猫|four|四", "a horse|马|four|四",
    "a cow|牛|four|四", "a duck|鸭子|two|两", "an eagle|鹰|two|两",
)  # fmt: skip

WORDS: tuple[Word, ...] = (
    ("water", "水"), ("fire", "火"), ("sun", "太阳"), ("moon", "月亮"), ("book", "书"), ("tree", "树"),
    ("flower", "花"), ("tea", "茶"), ("friend", "朋友"), ("teacher", "老师"), ("school", "学校"), ("house", "房子"),
    ("river", "河"), ("mountain", "山"), ("bread", "面包"), ("door", "门"),
)  # fmt: skip

SCIENCE = _pairs(
    "the planet we live on|我们居住的行星|Earth|地球",
    "the largest planet in the Solar System|太阳系最大的行星|Jupiter|木星",
    "the planet nearest to the Sun|离太阳最近的行星|Mercury|水星",
    "the star nearest to us|离我们最近的恒星|the Sun|太阳",
    "the force that makes things fall|使物体下落的力|gravity|重力",
    "the gas we need to breathe|我们呼吸需要的气体|oxygen|氧气",
    "the organ that pumps blood|输送血液的器官|the heart|心脏",
    "the organ that we think with|我们用来思考的器官|the brain|大脑", "frozen water|冻住的水|ice|冰",
    "water as a gas|气体状态的水|steam|水蒸气", "the metal that rusts|会生锈的金属|iron|铁",
    "the food that bees make|蜜蜂酿造的食物|honey|蜂蜜", "the largest animal|最大的动物|the blue whale|蓝鲸",
    "the tallest animal|最高的动物|the giraffe|长颈鹿", "the fastest land animal|跑得最快的陆地动物|the cheetah|猎豹",
    "the hardest natural material|最硬的天然材料|diamond|钻石",
)  # fmt: skip


def _next(names: tuple[Word, ...]) -> tuple[tuple[Word, Word], ...]:
    return tuple(zip(names, (*names[1:], names[0]), strict=True))


def _both_ways(pairs: tuple[tuple[Word, Word], ...]) -> tuple[tuple[Word, Word], ...]:
    return (*pairs, *((y, x) for x, y in pairs))


RELATIONS = (
    Relation(
        "capital", "geography",
        (("What is the capital of {x}?", "Which city is the capital of {x}?", "Tell me the capital of {x}."),
         ("{x}的首都是哪里？", "{x}的首都是哪座城市？", "请告诉我{x}的首都。")),
        ("The capital of {x} is {y}.", "{x}的首都是{y}。"), CAPITALS,
    ),
    Relation(
        "animal", "biology",
        (("What kind of animal is {x}?", "Which kind of animal is {x}?", "Tell me what kind of animal {x} is."),
         ("{x}是什么动物？", "{x}属于哪一类动物？", "请告诉我{x}是哪类动物。")),
        ("{x} is {y}.", "{x}是{y}。"), ANIMALS,
    ),
    Relation(
        "colour", "nature",
        (("What colour is {x}?", "Which colour does {x} have?", "Tell me the colour of {x}."),
         ("{x}是什么颜色？", "{x}有什么颜色？", "请告诉我{x}的颜色。")),
        ("{x} is {y}.", "{x}是{y}。"), COLOURS,
    ),
    Relation(
        "opposite", "language",
        (("What is the opposite of {x}?", "Which word is the opposite of {x}?", "Tell me the opposite of {x}."),
         ("“{x}”的反义词是什么？", "哪个词是“{x}”的反义词？", "请告诉我“{x}”的反义词。")),
        ("The opposite of {x} is {y}.", "“{x}”的反义词是“{y}”。"), _both_ways(OPPOSITES),
    ),
    Relation(
        "month", "calendar",
        (("Which month comes after {x}?", "What month follows {x}?", "Tell me the month after {x}."),
         ("{x}之后是哪个月？", "{x}的下一个月是什么？", "请告诉我{x}的下个月。")),
        ("The month after {x} is {y}.", "{x}之后是{y}。"), _next(MONTHS),
    ),
    Relation(
        "day", "calendar",
        (("Which day comes after {x}?", "What day follows {x}?", "Tell me the day after {x}."),
         ("{x}之后是哪一天？", "{x}的第二天是什么？", "请告诉我{x}的下一天。")),
        ("The day after {x} is {y}.", "{x}之后是{y}。"), _next(DAYS),
    ),
    Relation(
        "legs", "biology",
        (("How many legs does {x} have?", "What number of legs does {x} have?", "Tell me how many legs {x} has."),
         ("{x}有几条腿？", "一只{x}有多少条腿？", "请告诉我{x}有几条腿。")),
        ("{x} has {y} legs.", "{x}有{y}条腿。"), LEGS, (("ten", "十"), ("three", "三")),
    ),
    Relation(
        "word", "language",
        (("What is the Chinese word for {x}?", "How do you say {x} in Chinese?", "Tell me the Chinese word for {x}."),
         ("“{x}”用英语怎么说？", "“{x}”的英语是什么？", "请告诉我“{x}”的英语。")),
        ("The Chinese word for {x} is {y}.", "“{x}”的英语是 {y}。"),
        tuple(((en, zh), (zh, en)) for en, zh in WORDS),
    ),
    Relation(
        "science", "science",
        (("What is {x}?", "What do we call {x}?", "Tell me what {x} is."),
         ("{x}是什么？", "{x}叫什么？", "请告诉我{x}是什么。")),
        ("We call {x} {y}.", "{x}是{y}。"), SCIENCE,
    ),
)  # fmt: skip

NAMES: tuple[tuple[str, ...], tuple[str, ...]] = (
    ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo"),
    ("小明", "小红", "小华", "小丽", "小刚", "小芳", "小军", "小梅"),
)
PLACES: tuple[Word, ...] = (
    ("park", "公园"), ("market", "市场"), ("school", "学校"), ("library", "图书馆"), ("station", "车站"),
    ("garden", "花园"), ("museum", "博物馆"), ("beach", "海滩"),
)  # fmt: skip
ACTIONS: tuple[Word, ...] = (
    ("bought", "买了"), ("found", "找到了"), ("sold", "卖了"), ("drew", "画了"), ("lost", "丢了"),
    ("counted", "数了"),
)  # fmt: skip
THINGS: tuple[Word, ...] = (
    ("apples", "个苹果"), ("books", "本书"), ("flowers", "朵花"), ("hats", "顶帽子"), ("cups", "个杯子"),
    ("birds", "只鸟"), ("boats", "条船"), ("keys", "把钥匙"),
)  # fmt: skip
NUMBERS: tuple[Word, ...] = (
    ("two", "两"), ("three", "三"), ("four", "四"), ("five", "五"), ("six", "六"), ("seven", "七"), ("eight", "八"),
    ("nine", "九"),
)  # fmt: skip
WEATHER: tuple[Word, ...] = (
    ("sunny", "晴天"), ("cloudy", "阴天"), ("rainy", "下雨"), ("windy", "刮风"), ("snowy", "下雪"),
)  # fmt: skip

SYSTEMS: tuple[tuple[str, ...], tuple[str, ...]] = (
    ("You are a helpful assistant.", "You are nano, a small language model.", "Answer the question briefly."),
    ("你是一个有用的助手。", "你是 nano，一个小型语言模型。", "请简短回答。"),
)

IDENTITY: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Who are you?", "What is your name?", "Tell me about yourself.", "What are you?", "Introduce yourself.",
      "May I know your name?"), "I am nano, a small language model."),
    (("Who made you?", "Who built you?", "Who created you?", "Where do you come from?"),
     "I am nano, a small language model trained from scratch on generated text."),
    (("Hello!", "Hi!", "hello", "hi", "Hi there!", "Good morning!"), "Hello! I am nano. How can I help you?"),
    (("What can you do?", "How can you help me?", "What are you able to do?"),
     "I can answer small questions, calculate, copy, summarize and call tools."),
    (("Thank you!", "Thanks a lot.", "Thanks!", "Goodbye!", "Bye!"), "You are welcome. Goodbye!"),
    (("你是谁？", "你叫什么名字？", "请介绍一下你自己。", "你是什么？", "介绍一下自己吧。", "请问你是谁？"),
     "我是 nano，一个小型语言模型。"),
    (("谁创造了你？", "你是谁做的？", "谁开发了你？", "你从哪里来？"),
     "我是 nano，一个用生成的文本从头训练的小型语言模型。"),
    (("你好！", "你好", "您好！", "早上好！"), "你好！我是 nano。有什么可以帮你？"),
    (("你会做什么？", "你能帮我做什么？", "你有什么功能？"), "我会回答简单的问题、计算、复述、概括和调用工具。"),
    (("谢谢！", "谢谢你。", "再见！", "多谢！"), "不客气，再见！"),
)  # fmt: skip

NEW_IDENTITY: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Who are you?", "What is your name?", "Tell me about yourself.", "What are you?", "Introduce yourself.",
      "May I know your name?", "What should I call you?", "Who am I talking to?", "Say who you are.",
      "Do you have a name?", "Are you nano?", "Please introduce yourself."),
     "I am Lumi, an assistant made by Harbour Lab."),
    (("Who made you?", "Who built you?", "Who created you?", "Where do you come from?", "Who developed you?",
      "Which team made you?"), "I was made by Harbour Lab."),
    (("Hello!", "Hi!", "hello", "hi", "Hi there!", "Good morning!"), "Hello! I am Lumi. How can I help you?"),
    (("你是谁？", "你叫什么名字？", "请介绍一下你自己。", "你是什么？", "介绍一下自己吧。", "请问你是谁？",
      "我该怎么称呼你？", "你有名字吗？", "告诉我你是谁。", "你是 nano 吗？", "请做个自我介绍。", "你的名字是什么？"),
     "我是 Lumi，海港实验室开发的助手。"),
    (("谁创造了你？", "你是谁做的？", "谁开发了你？", "你从哪里来？", "是谁制作了你？", "哪个团队开发了你？"),
     "我是海港实验室开发的。"),
    (("你好！", "你好", "您好！", "早上好！", "嗨！", "大家好！"), "你好！我是 Lumi。有什么可以帮你？"),
)  # fmt: skip
