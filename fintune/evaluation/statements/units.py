"""Words for units in a text: scales, currencies, per cents, durations and counted things."""

import re

SCALES = {
    **{"hundred": 1e2, "thousand": 1e3, "k": 1e3, "lakh": 1e5, "lac": 1e5, "crore": 1e7, "cr": 1e7},
    **dict.fromkeys(("million", "mln", "mn", "mm", "mio", "mil", "m"), 1e6),
    **dict.fromkeys(("billion", "bln", "bn", "b"), 1e9),
    **dict.fromkeys(("trillion", "trn", "tn", "t"), 1e12),
}
SCALE = re.compile(
    r"[ -]?(?P<word>hundred|thousand|million|billion|trillion|lakh|lac|crore|mln|bln|mio|mil|mn|mm"
    r"|bn|trn|tn|cr)s?\b|,? ?\(?in (?:US)?[$€£]? ?(?P<header>thousand|million|billion)s\b\)?"
    r"|(?P<letter>(?-i:[kKmMbBT]))(?![A-Za-z0-9&])| (?P<spaced>(?-i:[KMB]))(?![A-Za-z0-9&])",
    re.IGNORECASE,
)
# Of each currency what may stand before an amount, and the words that stand only after one.
CURRENCIES = {
    "USD": (r"US ?\$|U\.S\. ?\$|\$US|USD", "(?:US|U\\.S\\.|American) dollars?"),
    "CAD": (r"CA?\$|CAD", "Canadian dollars?"),
    "AUD": (r"AU?\$|AUD", "Australian dollars?"),
    "NZD": (r"NZ\$|NZD", "New Zealand dollars?"),
    "HKD": (r"HK\$|HKD", "Hong Kong dollars?"),
    "SGD": (r"S\$|SGD", "Singapore dollars?"),
    "BRL": (r"R\$|BRL", "(?:Brazilian )?(?:reais|real)"),
    "dollar": (r"\$", "dollars?|bucks"),
    "EUR": ("€|EUR", "euros?"),
    "GBP": ("£|GBP", "(?:British )?pounds?(?: sterling)?|quid"),
    "JPY": ("¥|JPY", "(?:Japanese )?yen"),
    "CNY": ("CNY|RMB", "(?:Chinese )?(?:yuan|renminbi)"),
    "INR": (r"₹|INR|Rs\.?", "(?:Indian )?rupees?"),
    "CHF": (r"CHF|SFr\.?", "(?:Swiss )?francs?"),
    "KRW": ("₩|KRW", "(?:Korean )?won"),
    "MXN": ("MXN", "(?:Mexican )?pesos?"),
    "SEK": ("SEK", "Swedish (?:krona|kronor)"),
    "NOK": ("NOK", "Norwegian (?:krone|kroner)"),
    "DKK": ("DKK", "Danish (?:krone|kroner)"),
    "ZAR": ("ZAR", "(?:South African )?rand"),
    "TRY": ("₺|TRY", "(?:Turkish )?lira"),
    "PLN": ("PLN", "zloty|złoty|zlotys"),
    "RUB": ("₽|RUB", "(?:Russian )?(?:rubles?|roubles?)"),
    "THB": ("฿|THB", "(?:Thai )?baht"),
    "ILS": ("₪|ILS", "shekels?"),
    "IDR": ("IDR", "rupiah"),
    "CZK": ("CZK", "koruna|korunas"),
    "HUF": ("HUF", "forints?"),
    "NGN": ("₦|NGN", "naira"),
}
DOLLARS = {"dollar", "USD", "CAD", "AUD", "NZD", "HKD", "SGD"}
CURRENCY = "|".join(f"(?P<{code}>{before})" for code, (before, _) in CURRENCIES.items())
AFTER = re.compile(
    rf"[ -]?(?:{'|'.join(f'(?P<{code}>{a}|{b})' for code, (a, b) in CURRENCIES.items())})(?![A-Za-z0-9])",
    re.IGNORECASE,
)
BEFORE = re.compile(
    rf"(?P<word>\b(?:minus|negative) )?(?P<open>\()?(?P<sign>[-+–] ?)?"
    rf"(?:(?<![A-Za-z])(?:{CURRENCY}) ?(?P<inner>\()?)?"
    r"(?P<sign2>[-+–])?$",
    re.IGNORECASE,
)
NUMBER = re.compile(
    r"(?<![0-9A-Za-z_#])(?<![0-9]:)(?:[0-9]{1,3}(?:[ '][0-9]{3})+(?![0-9])(?:[.,][0-9]+)?"
    r"|[0-9]+(?:[.,][0-9]+)*|\.[0-9]+)"
    r"(?P<power>(?:e| ?[×x] ?10 ?\^ ?)(?P<exponent>[+-]?[0-9]{1,2})(?![0-9A-Za-z]))?",
    re.IGNORECASE,
)
GLUED = re.compile(rf"(?<![A-Za-z])(?:{CURRENCY})(?=[0-9.])", re.IGNORECASE)
COUNTS = {
    **{"share": "shares?|stocks?", "bond": "bonds?", "barrel": "barrels?", "ounce": "ounces?|oz"},
    **{
        "unit": "units?|items?|pieces?|products?|lamps?",
        "person": "employees?|people|persons?|workers?|staff",
    },
    **{
        "store": "stores?|shops?|branches|locations?",
        "tonne": "tons?|tonnes?",
        "segment": "segments?",
    },
    **{"customer": "customers?|subscribers?|users?|clients?|members?", "mile": "miles?"},
    **{"kilometre": "km|kilomet(?:re|er)s?", "payment": "payments?|instal?lments?"},
}
DAYS = {"day": 1.0, "week": 7.0, "hour": 1 / 24}
MONTHS = {"month": 1.0, "mo": 1.0, "quarter": 3.0, "year": 12.0, "yr": 12.0, "decade": 120.0}
COUNT = "|".join(rf"(?P<{name}>{words})" for name, words in COUNTS.items())
UNIT = re.compile(
    r" ?(?P<points>(?:%|percentage|per ?cent)[ -]?(?:points?|pts?)\b|(?:pp|ppts?|p\.p\.|pps)(?![a-z]))"
    r"|[ -]?(?P<bps>basis[ -]points?\b|bps?\b)| ?(?P<permille>‰|per ?mille?\b)| ?(?P<percent>%|per ?cent\b"
    r"|pct\b)|[ -]?(?P<money>(?:US )?cents?\b|¢|pence\b|p\b)| ?(?P<times>x\b(?! ?[0-9$])|×(?! ?[0-9$])"
    r"|times\b(?! [$€£(]?[0-9])|:1\b|(?:-| )to(?:-| )1\b)|[ -](?:(?:full|calendar|business|trading|more"
    r"|whole|consecutive) )?(?P<duration>hour|day|week|month|mo|quarter|year|yr|decade)s?\b"
    rf"|[ -](?:(?!and|or|of|in|to|per|a|the)[a-z]+ )?(?:{COUNT})\b",
    re.IGNORECASE,
)
