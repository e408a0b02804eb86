"""Kinds of computed questions: each draws its numbers and computes the answer.

A kind returns the fields of its wordings in demo_questions_wordings.toml, formatted for printing:
those of the question and those that the answer adds. Numbers are decimals, rounded half up.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from decimal import ROUND_CEILING, ROUND_HALF_UP, Decimal

Fields = dict[str, str]


class Draw:
    """Random choices that are stable across Python versions: only `random()` guarantees its sequence."""

    def __init__(self, rng: random.Random) -> None:
        """Draw from this generator."""
        self._rng = rng

    def number(self, low: int, high: int, step: int) -> Decimal:
        """Draw one of low, low + step, ..., up to and including high."""
        return Decimal(self._pick(range(low, high + 1, step)))

    def quarters(self, low: int, high: int) -> Decimal:
        """Draw a rate in percent between low and high, in steps of a quarter."""
        return self.number(4 * low, 4 * high, 1) / 4

    def word(self, *options: str) -> str:
        """Draw one of the options."""
        return options[self._pick(range(len(options)))]

    def _pick(self, options: range) -> int:
        return options[int(self._rng.random() * len(options))]


Kind = Callable[[Draw], Fields]


def rounded(value: Decimal, places: int) -> str:
    """Format the value with this number of decimals, rounded half up."""
    return f"{value.quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP):,}"


def cents(value: Decimal) -> str:
    """Format dollars with cents, rounded."""
    return f"${rounded(value, 2)}"


def money(value: Decimal) -> str:
    """Format an exact amount in dollars, with cents only if there are any.

    Raises:
        ValueError: the value is finer than a cent.
    """
    if value != value.quantize(Decimal("0.01")):
        raise ValueError(f"{value} is finer than a cent: print it with cents()")
    return f"${rounded(value, 0 if value == value.to_integral_value() else 2)}"


def percent(value: Decimal) -> str:
    """Format a percentage exactly, without trailing zeros."""
    return f"{value.normalize():f}%"


def count(value: Decimal) -> str:
    """Format a whole number."""
    return f"{value:,}"


def compound_interest(draw: Draw) -> Fields:
    """Compute principal times (1 + rate per period) to the power of the periods."""
    principal, rate = draw.number(500, 20_000, 500), draw.quarters(2, 9)
    years, compounding = draw.number(2, 25, 1), draw.word("annually", "quarterly", "monthly")
    periods = {"annually": 1, "quarterly": 4, "monthly": 12}[compounding]
    total = principal * (1 + rate / 100 / periods) ** (periods * years)
    return {
        "principal": money(principal),
        "rate": percent(rate),
        "years": count(years),
        "compounding": compounding,
        "total": cents(total),
        "interest": cents(total - principal),
    }


def simple_interest(draw: Draw) -> Fields:
    """Compute principal times rate times years."""
    principal, rate = draw.number(400, 20_000, 200), draw.quarters(2, 12)
    years = draw.number(2, 10, 1)
    yearly = principal * rate / 100
    return {
        "principal": money(principal),
        "rate": percent(rate),
        "years": count(years),
        "yearly": money(yearly),
        "interest": money(yearly * years),
    }


def monthly_payment(principal: Decimal, rate: Decimal, months: Decimal) -> Decimal:
    """Compute the payment, to the cent, that repays a loan in equal payments at the end of each month."""
    monthly_rate = rate / 1200
    payment = principal * monthly_rate / (1 - (1 + monthly_rate) ** -months)
    return payment.quantize(Decimal("0.01"), ROUND_HALF_UP)


def loan_payment(draw: Draw) -> Fields:
    """Compute the equal monthly payment on a fixed-rate loan."""
    loan = draw.word("car loan", "personal loan", "student loan", "mortgage")
    if loan == "mortgage":
        principal, years = draw.number(100_000, 600_000, 5_000), draw.number(15, 30, 5)
    else:
        principal, years = draw.number(4_000, 40_000, 500), draw.number(2, 7, 1)
    rate, months = draw.quarters(3, 11), years * 12
    return {
        "loan": loan,
        "principal": money(principal),
        "rate": percent(rate),
        "years": count(years),
        "months": count(months),
        "payment": cents(monthly_payment(principal, rate, months)),
    }


def loan_interest(draw: Draw) -> Fields:
    """Compute all payments on a fixed-rate loan, each rounded to the cent, less the principal."""
    principal, rate = draw.number(5_000, 80_000, 1_000), draw.quarters(3, 12)
    years = draw.number(2, 15, 1)
    months = years * 12
    payment = monthly_payment(principal, rate, months)
    return {
        "principal": money(principal),
        "rate": percent(rate),
        "years": count(years),
        "months": count(months),
        "payment": cents(payment),
        "paid": cents(payment * months),
        "interest": cents(payment * months - principal),
    }


def savings_goal(draw: Draw) -> Fields:
    """Spread the missing amount over the months, without interest."""
    goal, saved = draw.number(2_000, 30_000, 500), draw.number(100, 1_500, 100)
    months = draw.number(6, 48, 1)
    return {
        "goal": money(goal),
        "saved": money(saved),
        "months": count(months),
        "missing": money(goal - saved),
        "monthly": cents((goal - saved) / months),
    }


def percent_change(draw: Draw) -> Fields:
    """Compute change over starting value."""
    old, share = draw.number(20, 400, 4), draw.number(5, 60, 1)
    change = (old * share / 100).quantize(Decimal(1), ROUND_CEILING)
    direction = draw.word("an increase", "a decrease")
    return {
        "old": money(old),
        "new": money(old + change if direction == "an increase" else old - change),
        "change": money(change),
        "direction": direction,
        "percent": f"{rounded(change / old * 100, 1)}%",
    }


def rule_of_72(draw: Draw) -> Fields:
    """Compute the years to double: 72 over the rate in percent."""
    amount, rate = draw.number(1_000, 50_000, 1_000), draw.quarters(2, 12)
    return {
        "amount": money(amount),
        "rate": percent(rate),
        "double": money(amount * 2),
        "years": rounded(72 / rate, 1),
    }


def dividend_yield(draw: Draw) -> Fields:
    """Compute annual dividend over share price."""
    price, share = draw.number(12, 240, 1), draw.number(10, 70, 1)
    dividend = (price * share / 1000).quantize(Decimal("0.01"), ROUND_HALF_UP)
    return {
        "price": money(price),
        "dividend": money(dividend),
        "yield": f"{rounded(dividend / price * 100, 2)}%",
    }


def bond_current_yield(draw: Draw) -> Fields:
    """Compute annual coupon over the price of the bond."""
    face, coupon = Decimal(1_000) * draw.number(1, 10, 1), draw.quarters(2, 8)
    price, income = face * draw.number(85, 112, 1) / 100, face * coupon / 100
    return {
        "face": money(face),
        "coupon": percent(coupon),
        "price": money(price),
        "income": money(income),
        "yield": f"{rounded(income / price * 100, 2)}%",
    }


def earnings_per_share(draw: Draw) -> Fields:
    """Compute net profit over shares."""
    profit = draw.number(200_000, 9_000_000, 50_000)
    shares = draw.number(100_000, 2_000_000, 50_000)
    return {"profit": money(profit), "shares": count(shares), "earnings": cents(profit / shares)}


def price_to_earnings(draw: Draw) -> Fields:
    """Compute share price over earnings per share."""
    earnings, multiple = draw.number(50, 900, 5) / 100, draw.number(7, 38, 1)
    price = (earnings * multiple).to_integral_value(ROUND_CEILING)
    return {
        "price": money(price),
        "earnings": money(earnings),
        "ratio": rounded(price / earnings, 1),
    }


def inflation_value(draw: Draw) -> Fields:
    """Compute a later amount in today's dollars."""
    amount, inflation = draw.number(1_000, 50_000, 500), draw.quarters(1, 6)
    years = draw.number(3, 30, 1)
    return {
        "amount": money(amount),
        "inflation": percent(inflation),
        "years": count(years),
        "value": cents(amount / (1 + inflation / 100) ** years),
    }


def break_even_units(draw: Draw) -> Fields:
    """Compute fixed costs over contribution per unit, rounded up."""
    fixed, cost = draw.number(500, 9_000, 100), draw.number(2, 40, 1)
    contribution = draw.number(3, 35, 1)
    return {
        "fixed": money(fixed),
        "cost": money(cost),
        "price": money(cost + contribution),
        "contribution": money(contribution),
        "units": count((fixed / contribution).to_integral_value(ROUND_CEILING)),
    }


def profit_margin(draw: Draw) -> Fields:
    """Compute profit over revenue."""
    revenue, share = draw.number(2_000, 90_000, 500), draw.number(40, 95, 1)
    cost = revenue * share // 5000 * 50
    return {
        "revenue": money(revenue),
        "cost": money(cost),
        "profit": money(revenue - cost),
        "margin": f"{rounded((revenue - cost) / revenue * 100, 1)}%",
    }


def markup(draw: Draw) -> Fields:
    """Compute gain over cost."""
    cost, gain = draw.number(4, 90, 1), draw.number(2, 45, 1)
    return {
        "cost": money(cost),
        "price": money(cost + gain),
        "gain": money(gain),
        "markup": f"{rounded(gain / cost * 100, 1)}%",
    }


def card_interest(draw: Draw) -> Fields:
    """Compute one month of interest: balance times APR over twelve."""
    balance, apr = draw.number(200, 9_000, 100), draw.quarters(14, 30)
    yearly = balance * apr / 100
    return {
        "balance": money(balance),
        "apr": percent(apr),
        "yearly": money(yearly),
        "interest": cents(yearly / 12),
    }


def debt_to_income(draw: Draw) -> Fields:
    """Compute monthly debt payments over gross monthly income."""
    housing, other = draw.number(700, 2_500, 50), draw.number(50, 900, 25)
    income = draw.number(3_500, 11_000, 100)
    return {
        "housing": money(housing),
        "other": money(other),
        "income": money(income),
        "debts": money(housing + other),
        "ratio": f"{rounded((housing + other) / income * 100, 1)}%",
    }


def net_worth(draw: Draw) -> Fields:
    """Compute assets minus debts; always positive here."""
    cash, investments = draw.number(1_000, 30_000, 500), draw.number(5_000, 200_000, 1_000)
    debt = (cash + investments) * draw.number(5, 90, 1) // 50_000 * 500
    return {
        "cash": money(cash),
        "investments": money(investments),
        "debt": money(debt),
        "assets": money(cash + investments),
        "worth": money(cash + investments - debt),
    }


def sales_tax(draw: Draw) -> Fields:
    """Compute price plus tax."""
    item = draw.word("bike", "laptop", "table", "phone", "camera", "sofa")
    price, rate = draw.number(80, 1_500, 5), draw.quarters(4, 10)
    tax = (price * rate / 100).quantize(Decimal("0.01"), ROUND_HALF_UP)
    return {
        "item": item,
        "price": money(price),
        "rate": percent(rate),
        "tax": cents(tax),
        "total": cents(price + tax),
    }


def tip_total(draw: Draw) -> Fields:
    """Compute bill plus tip."""
    bill, rate = draw.number(1_200, 16_000, 25) / 100, draw.number(10, 25, 1)
    tip = (bill * rate / 100).quantize(Decimal("0.01"), ROUND_HALF_UP)
    return {
        "bill": money(bill),
        "rate": percent(rate),
        "tip": cents(tip),
        "total": cents(bill + tip),
    }


def tax_saving(draw: Draw) -> Fields:
    """Compute deduction times marginal rate."""
    deduction, rate = draw.number(400, 15_000, 100), draw.number(10, 37, 1)
    return {
        "deduction": money(deduction),
        "rate": percent(rate),
        "saving": money(deduction * rate / 100),
    }


def emergency_fund(draw: Draw) -> Fields:
    """Compute monthly expenses times months."""
    expenses, months = draw.number(1_200, 6_500, 50), draw.number(3, 12, 1)
    return {"expenses": money(expenses), "months": count(months), "fund": money(expenses * months)}


def annual_pay(draw: Draw) -> Fields:
    """Compute hourly wage times weekly hours times 52."""
    wage, hours = draw.number(48, 240, 1) / 4, draw.number(16, 48, 2)
    return {
        "wage": money(wage),
        "hours": count(hours),
        "weekly": money(wage * hours),
        "annual": money(wage * hours * 52),
    }


def currency_conversion(draw: Draw) -> Fields:
    """Compute dollars times the given exchange rate."""
    currency = draw.word("euros", "pounds", "Swiss francs", "Canadian dollars", "Mexican pesos")
    low, high = {
        "euros": (80, 98),
        "pounds": (70, 85),
        "Swiss francs": (78, 99),
        "Canadian dollars": (125, 145),
        "Mexican pesos": (1_600, 2_100),
    }[currency]
    amount, rate = draw.number(50, 3_000, 25), draw.number(low, high, 1) / 100
    return {
        "currency": currency,
        "amount": money(amount),
        "rate": rounded(rate, 2),
        "result": rounded(amount * rate, 2),
    }


def straight_line_depreciation(draw: Draw) -> Fields:
    """Compute cost minus salvage value, over the years of use."""
    cost, years = draw.number(2_000, 60_000, 500), draw.number(3, 12, 1)
    salvage = cost * draw.number(5, 30, 1) // 10_000 * 100
    return {
        "cost": money(cost),
        "salvage": money(salvage),
        "years": count(years),
        "base": money(cost - salvage),
        "yearly": cents((cost - salvage) / years),
    }


def mileage_deduction(draw: Draw) -> Fields:
    """Compute miles times the given rate in cents."""
    miles, rate = draw.number(200, 15_000, 50), draw.number(45, 75, 1)
    return {"miles": count(miles), "cents": count(rate), "deduction": money(miles * rate / 100)}


def after_fee_return(draw: Draw) -> Fields:
    """Compute amount times return minus fee, for one year."""
    amount, growth = draw.number(2_000, 90_000, 1_000), draw.number(30, 120, 5) / 10
    fee = draw.number(5, 150, 5) / 100
    return {
        "amount": money(amount),
        "growth": percent(growth),
        "fee": percent(fee),
        "net": percent(growth - fee),
        "gain": money(amount * (growth - fee) / 100),
    }


KINDS: tuple[Kind, ...] = (
    compound_interest,
    simple_interest,
    loan_payment,
    loan_interest,
    savings_goal,
    percent_change,
    rule_of_72,
    dividend_yield,
    bond_current_yield,
    earnings_per_share,
    price_to_earnings,
    inflation_value,
    break_even_units,
    profit_margin,
    markup,
    card_interest,
    debt_to_income,
    net_worth,
    sales_tax,
    tip_total,
    tax_saving,
    emergency_fund,
    annual_pay,
    currency_conversion,
    straight_line_depreciation,
    mileage_deduction,
    after_fee_return,
)
