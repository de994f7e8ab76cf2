"""Labelled by hand: is the response's answer right? One case a line: "+" right or "-" wrong, gold ¦ response.

⏎ stands for a line break, ⎵ for a thin space, a line with "#" names the form of the cases below it.

What the labels follow: the last line with "Answer:" counts, and it must hold one answer. Markup around it, a
name before "=", a unit after it and the final full stop are no part of it. An integer must be written out;
elsewhere what is mathematically equal is right, an approximation is not. A doubt, two answers, or none is
wrong even where one of them is right.
"""

from typing import NamedTuple

from tests.dapo.reward.more_answer_cases import MORE

TEXT = r"""
# an integer in markup
+ 34 ¦ Answer: 34
+ 34 ¦ **Answer:** 34
+ 34 ¦ **Answer: 34**
+ 34 ¦ **Answer**: 34
+ 34 ¦ **Answer:** **34**
+ 34 ¦ Answer: **34**
+ 34 ¦ *Answer:* 34
+ 34 ¦ *Answer: 34*
+ 34 ¦ ***Answer: 34***
+ 34 ¦ __Answer:__ 34
+ 34 ¦ _Answer: 34_
+ 34 ¦ ### Answer: 34
+ 34 ¦ > Answer: 34
+ 34 ¦ - **Answer:** 34
+ 34 ¦ Answer: `34`
+ 34 ¦ Answer: "34"
+ 34 ¦ Answer: “34”
+ 34 ¦ Answer: '34'
+ 34 ¦ Answer: (34)
+ 34 ¦ Answer: \(34\)
+ 34 ¦ Answer: \[34\]
+ 34 ¦ Answer: \( 34 \)
+ 34 ¦ Answer: \[ 34 \].
+ 34 ¦ Answer: $34$
+ 34 ¦ Answer: $ 34 $
+ 34 ¦ Answer: $$34$$
+ 34 ¦ Answer: $34$.
+ 34 ¦ Answer: **$34$**
+ 34 ¦ **Answer: $34$**
+ 34 ¦ **Answer:** $\boxed{34}$
+ 34 ¦ Answer: \boxed{34}
+ 34 ¦ Answer: \boxed{ 34 }.
+ 34 ¦ Answer: $\boxed{34}$.
+ 34 ¦ Answer: \[\boxed{34}\]
+ 34 ¦ Answer: \(\boxed{34}\)
+ 34 ¦ Answer: $\boxed{\boxed{34}}$
+ 34 ¦ Answer: \fbox{34}
+ 34 ¦ Answer: \text{34}
+ 34 ¦ Answer: $\mathbf{34}$
+ 34 ¦ Answer: $\boxed{\text{34}}$
+ 34 ¦ Answer: $\textbf{34}$
+ 34 ¦ Answer: $\displaystyle 34$
+ 34 ¦ Answer: {34}
+ 34 ¦ Answer: ${34}$
# spelling of "Answer:" and the spaces around it
+ 34 ¦ answer: 34
+ 34 ¦ ANSWER: 34
+ 34 ¦ ANSWER :  34
+ 34 ¦ Answer:34
+ 34 ¦ Answer：34
+ 34 ¦ **Answer：** 34
+ 34 ¦ The final answer: 34
+ 34 ¦ **Final Answer:** 34
+ 34 ¦ So my answer: 34
+ 34 ¦ Answer: The final answer is 34.
+ 34 ¦ Answer: The answer is $34$.
+ 34 ¦ Answer: My answer is: 34
+ 34 ¦ Some work.⏎Answer: 34
+ 34 ¦ Some work.⏎⏎Answer: 34⏎⏎
+ 34 ¦ Answer: 34⏎That was it.
+ 34 ¦ Answer: 34⏎⏎I checked it twice, and 35 cannot be.
+ 34 ¦ The answer is 35? No.⏎Answer: 34
# spelling of the integer
+ 34 ¦ Answer: 34.
+ 34 ¦ Answer: 34.0
+ 34 ¦ Answer: 34.00
+ 34 ¦ Answer: 34.0.
+ 34 ¦ Answer: 034
+ 34 ¦ Answer: 00034
+ 34 ¦ Answer: +34
+ 34 ¦ Answer: + 34
+ 34 ¦ Answer: ３４
+ 34 ¦ Answer: 34。
+ 34 ¦ Answer: $+34.0$
+ 34.0 ¦ Answer: 34
+ +034 ¦ Answer: 34
+ $34$ ¦ Answer: 34
+ \boxed{34} ¦ Answer: 34
+ -7 ¦ Answer: -7
+ -7 ¦ Answer: −7
+ -7 ¦ Answer: –7
+ -7 ¦ Answer: －7
+ -7 ¦ Answer: - 7
+ -7 ¦ Answer: $-7$
+ -7 ¦ Answer: **−7.**
+ −7 ¦ Answer: -7
+ -7 ¦ Answer: -07.0
+ 0 ¦ Answer: 0
+ 0 ¦ Answer: -0
+ 0 ¦ Answer: 0.00
+ 0 ¦ Answer: 000
+ 7 ¦ Answer: 007
+ 1234567 ¦ Answer: 1,234,567
+ 1234567 ¦ Answer: $1{,}234{,}567$
+ 1234567 ¦ Answer: $1\,234\,567$
+ 1234567 ¦ Answer: $1,\!234,\!567$
+ 1234567 ¦ Answer: 1⎵234⎵567
+ 1,234,567 ¦ Answer: 1234567
+ -1234 ¦ Answer: −1,234
+ 1000 ¦ Answer: 1,000.00
+ 9007199254740993 ¦ Answer: 9007199254740993
+ 123456789012345678901234567890 ¦ Answer: 123,456,789,012,345,678,901,234,567,890
+ 123456789012345678901234567890 ¦ Answer: 123456789012345678901234567890.0
# a unit after it, money before it
+ 34 ¦ Answer: 34 apples
+ 34 ¦ Answer: $34$ apples
+ 34 ¦ Answer: **34** apples
+ 34 ¦ **Answer: 34 apples**
+ 34 ¦ Answer: \boxed{34} apples
+ 34 ¦ Answer: $\boxed{34}$ apples.
+ 34 ¦ Answer: \boxed{34 \text{ apples}}
+ 34 ¦ Answer: $34\text{ apples}$
+ 34 ¦ Answer: 34cm
+ 34 ¦ Answer: 34 cm
+ 34 ¦ Answer: 34 m
+ 34 ¦ Answer: 34 cm^2
+ 34 ¦ Answer: 34 cm²
+ 34 ¦ Answer: $34 \text{ cm}^2$
+ 34 ¦ Answer: $34 \, \mathrm{cm}^{2}$
+ 34 ¦ Answer: 34 square units
+ 34 ¦ Answer: 34 km/h
+ 34 ¦ Answer: 34 miles per hour
+ 34 ¦ Answer: 34 m/s^2
+ 34 ¦ Answer: $34^\circ$
+ 34 ¦ Answer: $34^{\circ}$
+ 34 ¦ Answer: 34°
+ 34 ¦ Answer: 34 degrees
+ 34 ¦ Answer: 34%
+ 34 ¦ Answer: $34\%$
+ 34 ¦ Answer: 34 percent
+ 34 ¦ Answer: 34 ways
+ 34 ¦ Answer: 34 integers
+ 34 ¦ Answer: 34 (apples)
+ 34 ¦ Answer: 34.0 hours
+ 34 ¦ Answer: $34
+ 34 ¦ Answer: \$34
+ 34 ¦ Answer: $34.00
+ 34 ¦ Answer: 34 dollars
+ 34 ¦ Answer: 34 个
+ 1500 ¦ Answer: 1,500 dollars
+ -5 ¦ Answer: −5 °C
# a name before it
+ 34 ¦ Answer: x = 34
+ 34 ¦ Answer: $x = 34$
+ 34 ¦ Answer: $x$ = 34
+ 34 ¦ Answer: $m + n = 34$
+ 34 ¦ Answer: $m+n = 25 + 9 = 34$
+ 34 ¦ Answer: $N=\boxed{34}$
+ 34 ¦ Answer: x=34 cm
+ 34 ¦ Answer: = 34
+ -3 ¦ Answer: $f(2) = -3$
# the last answer line counts
+ 34 ¦ Answer: 35⏎Wait.⏎**Answer:** 34
+ 34 ¦ Answer: 1⏎Answer: 2⏎Answer: 34
- 34 ¦ Answer: 34⏎Answer: 35
- 34 ¦ Answer: 34⏎No, I made a mistake.⏎**Answer: 33**
- 34 ¦ Answer: 34⏎Answer:
- 34 ¦ Answer: 34⏎Answer: unknown
- 34 ¦ Answer: 34⏎The last line should be "Answer: $Answer".
# no answer
- 34 ¦
- 34 ¦ 34
- 34 ¦ The result is 34.
- 34 ¦ \boxed{34}
- 34 ¦ The answer is 34
- 34 ¦ Answer 34
- 34 ¦ Answer
- 34 ¦ Answer:
- 34 ¦ **Answer:**
- 34 ¦ Answer: $$
- 34 ¦ Answer: .
- 34 ¦ Answer: \boxed{}
- 34 ¦ Answer:⏎34
- 34 ¦ Answer:⏎⏎34
- 34 ¦ nonanswer: 34
- 34 ¦ Result: 34
- 34 ¦ Answer: thirty-four
- 34 ¦ Answer: XXXIV
- 34 ¦ Answer: I don't know
- 34 ¦ Answer: $Answer
- 34 ¦ Answer: [34]
- 34 ¦ Answer: {3,4}
# two answers, or a doubt
- 34 ¦ Answer: 34 or 35
- 34 ¦ Answer: 35 or 34
- 34 ¦ Answer: 34 and 35
- 34 ¦ Answer: 34, 35
- 34 ¦ Answer: 35, 34
- 34 ¦ Answer: 34, 34
- 34 ¦ Answer: 34; 35
- 34 ¦ Answer: 34/35
- 34 ¦ Answer: 34 35
- 34 ¦ Answer: 35 34
- 34 ¦ Answer: $34$ $35$
- 34 ¦ Answer: $34$ or $35$
- 34 ¦ Answer: $34$, $35$
- 34 ¦ Answer: \boxed{34} or \boxed{35}
- 34 ¦ Answer: \boxed{34}, \boxed{35}
- 34 ¦ Answer: \boxed{34 \text{ or } 35}
- 34 ¦ Answer: "34" or "35"
- 34 ¦ Answer: **34** / **35**
- 34 ¦ Answer: 34 Answer: 35
- 34 ¦ Answer: 34 Answer: 34
- 34 ¦ Answer: 34 (or 35)
- 34 ¦ Answer: 34 (35)
- 34 ¦ Answer: 34 or thirty-five
- 34 ¦ Answer: 34 to 36
- 34 ¦ Answer: 34-36
- 34 ¦ Answer: 34–36
- 34 ¦ Answer: 34 ± 1
- 34 ¦ Answer: between 33 and 35
- 34 ¦ Answer: 34?
- 34 ¦ Answer: 34 (?)
- 34 ¦ Answer: 34 maybe
- 34 ¦ Answer: maybe 34
- 34 ¦ Answer: probably 34
- 34 ¦ Answer: about 34
- 34 ¦ Answer: approximately 34
- 34 ¦ Answer: ≈ 34
- 34 ¦ Answer: ~34
- 34 ¦ Answer: 34 or so
- 34 ¦ Answer: 34 I guess
- 34 ¦ Answer: 34 the others being worth more than that here
- 34 ¦ Answer: not 34
- 34 ¦ Answer: 34 is wrong
- 34 ¦ Answer: 34 apples and 35 pears
- 34 ¦ Answer: x = 34 or x = 35
- 34 ¦ Answer: x = 35, y = 34
- 34 ¦ Answer: x = 35 and y = 34
- 34 ¦ Answer: x = 35 y = 34
- 34 ¦ Answer: $x = 35, x = 34$
- 34 ¦ Answer: 35 = 34
- 34 ¦ Answer: 34 = 35
- 34 ¦ Answer: x ≥ 34
- 34 ¦ Answer: x >= 34
- 34 ¦ Answer: x != 34
- 34 ¦ Answer: x < 34
# another number
- 34 ¦ Answer: 35
- 34 ¦ Answer: 43
- 34 ¦ Answer: 3
- 34 ¦ Answer: 4
- 34 ¦ Answer: 340
- 34 ¦ Answer: 134
- 34 ¦ Answer: -34
- 34 ¦ Answer: −34
- 34 ¦ Answer: --34
- 34 ¦ Answer: 34.5
- 34 ¦ Answer: 34.05
- 34 ¦ Answer: 34.0001
- 34 ¦ Answer: 0.34
- 34 ¦ Answer: .34
- 34 ¦ Answer: 33.9999999999
- 34 ¦ Answer: 3.4e1
- 34 ¦ Answer: 34e0
- 34 ¦ Answer: 3 4
- 34 ¦ Answer: 3,4
- 34 ¦ Answer: 3_4
- 34 ¦ Answer: 0x22
- 34 ¦ Answer: 3\boxed{4}
- 34 ¦ Answer: 3**4
- 34 ¦ Answer: 3$4$
- 34 ¦ Answer: $3$$4$
- 34 ¦ Answer: 33+1
- 34 ¦ Answer: 34 + 1
- 34 ¦ Answer: 68/2
- 34 ¦ Answer: 34/1
- 34 ¦ Answer: \frac{68}{2}
- 34 ¦ Answer: 34!
- 34 ¦ Answer: 34²
- 34 ¦ Answer: 34^2
- 34 ¦ Answer: 34x
- 34 ¦ Answer: 34 x
- 34 ¦ Answer: 34i
- 34 ¦ Answer: 34π
- 34 ¦ Answer: 34\pi
- 34 ¦ Answer: 34 pi
- 34 ¦ Answer: 34\sqrt{2}
- 34 ¦ Answer: 34 million
- 34 ¦ Answer: 34 thousand dollars
- 34 ¦ Answer: 34 dozen
- 34 ¦ Answer: 34 hundredths
- 34 ¦ Answer: 34 point five
- 34 ¦ Answer: 34 squared
- 34 ¦ Answer: 34 plus x
- 34 ¦ Answer: 34 divided by two
- 34 ¦ Answer: \boxed{34
- 34 ¦ Answer: x = 35
- 34 ¦ Answer: 35 apples
- 34 ¦ Answer: $35$ apples
- 34 ¦ Answer: 35%
- 7 ¦ Answer: -7
- -7 ¦ Answer: 7
- 0 ¦ Answer: 1
- 0 ¦ Answer: O
- 1234567 ¦ Answer: 12,34,567
- 1234567 ¦ Answer: 1,234,568
- 1234567 ¦ Answer: 1.234.567
- 1234567 ¦ Answer: 1 234 567 8
- 1234567 ¦ Answer: 1234,567
- 9007199254740993 ¦ Answer: 9007199254740992
- 123456789012345678901234567890 ¦ Answer: 123456789012345678901234567891
- 100 ¦ Answer: 10^2
# fractions and decimals
+ 1/2 ¦ Answer: 1/2
+ 1/2 ¦ Answer: 0.5
+ 1/2 ¦ Answer: .5
+ 1/2 ¦ Answer: 2/4
+ 1/2 ¦ Answer: \frac{1}{2}
+ 1/2 ¦ Answer: $\frac{1}{2}$.
+ 1/2 ¦ Answer: $\dfrac12$
+ 1/2 ¦ Answer: \boxed{\frac{1}{2}}
+ 1/2 ¦ **Answer:** $\boxed{\dfrac{1}{2}}$
+ 1/2 ¦ Answer: x = 1/2
+ 1/2 ¦ Answer: $p = \frac{1}{2}$
+ 1/2 ¦ Answer: 50%
+ \frac{1}{2} ¦ Answer: 1/2
+ \frac{1}{2} ¦ Answer: **1/2**
+ -\frac{3}{4} ¦ Answer: -3/4
+ -\frac{3}{4} ¦ Answer: −0.75
+ -3/4 ¦ Answer: \frac{-3}{4}
+ 1.5 ¦ Answer: 1.50
+ 1.5 ¦ Answer: 3/2
+ 1.5 ¦ Answer: 1\frac{1}{2}
+ 3.5 ¦ Answer: 3.5 cm
+ 3.5 ¦ Answer: 3.5.
+ 3.5 ¦ Answer: 3.5 apples
+ 1/2 ¦ Answer: x = 2/4 = 1/2
+ \pm 2 ¦ Answer: 2, -2
+ 1234.5 ¦ Answer: 1,234.5
+ 0.1 ¦ Answer: 10^{-1}
+ -\frac{3}{4} ¦ Answer: $-\dfrac 34$
+ 7/3 ¦ Answer: 014/6.
- 1/2 ¦ Answer: 1/-2
- 1/2 ¦ Answer: 0.5.0
- 7/3 ¦ Answer: 2 1/3 or 7/4
- 1/2 ¦ Answer: 1/3
- 1/2 ¦ Answer: -1/2
- 1/2 ¦ Answer: 2
- 1/2 ¦ Answer: 2/1
- 1/2 ¦ Answer: 1
- 1/2 ¦ Answer: 0.49
- 1/2 ¦ Answer: 0.5000001
- 1/2 ¦ Answer: 1/2?
- 1/2 ¦ Answer: 1/2 or 1/3
- 1/2 ¦ Answer: 1/2, 1/3
- 1/2 ¦ Answer: 1/2 1/3
- 1/2 ¦ Answer: $1/2$ or $1/3$
- 1/2 ¦ Answer: maybe 1/2
- 1/2 ¦ Answer: 1/2, 1/2
- 1/2 ¦ Answer: 1/2 and 1/3
- 1/2 ¦ Answer: 1/3 = 1/2
- 1/2 ¦ Answer: 1/2 = 1/3
- 1/2 ¦ Answer: x = 1/3, y = 1/2
- 1/2 ¦ Answer: x > 1/2
- 3.5 ¦ Answer: 3.5 million
- 1/2 ¦ Answer: \frac{1}{2} \text{ or } \frac{1}{3}
- 1/2 ¦ Answer: one half
- 1/2 ¦ Answer:
- 1/2 ¦ 1/2
- 1/2 ¦ Answer: 1/2⏎Answer: 1/3
- 1/2 ¦ Answer: 1/0
- 1/2 ¦ Answer: \frac{1}{2
- 1/3 ¦ Answer: 0.33
- 1/3 ¦ Answer: 0.333333
- 1.5 ¦ Answer: 1
- 1.5 ¦ Answer: 15
- 3.14 ¦ Answer: 22/7
# roots, powers, constants
+ 2\sqrt{3} ¦ Answer: $2\sqrt{3}$
+ 2\sqrt{3} ¦ Answer: \sqrt{12}
+ 2\sqrt{3} ¦ Answer: 2sqrt(3)
+ \sqrt{2} ¦ Answer: √2
+ \frac{\sqrt{2}}{2} ¦ Answer: \frac{1}{\sqrt{2}}
+ 2\pi ¦ Answer: $2\pi$
+ 2\pi ¦ Answer: 2π
+ 2\pi ¦ Answer: 2pi
+ \frac{\pi}{4} ¦ Answer: \pi/4
+ 2^{100} ¦ Answer: 1267650600228229401496703205376
+ 2^{10} ¦ Answer: 1024
+ e^{2} ¦ Answer: e^2
+ \binom{5}{2} ¦ Answer: 10
+ 5! ¦ Answer: 120
+ 3+4i ¦ Answer: 4i+3
- 2\sqrt{3} ¦ Answer: 3\sqrt{2}
- 2\sqrt{3} ¦ Answer: 3.46
- \sqrt{2} ¦ Answer: 2
- \sqrt{2} ¦ Answer: 1.414
- \sqrt{2} ¦ Answer: -\sqrt{2}
- \pi ¦ Answer: 3.14
- \pi ¦ Answer: 22/7
- 2\pi ¦ Answer: \pi
- 2^{100} ¦ Answer: 1267650600228229401496703205377
- 2^{100} ¦ Answer: 100^{2}
- 3+4i ¦ Answer: 3-4i
- 2^{100} ¦ Answer: 9^{9^{9^{9}}}
- 1/2 ¦ Answer: 10^{1000000000}
- 1/2 ¦ Answer: 99999999!
# expressions
+ x+1 ¦ Answer: x+1
+ x+1 ¦ Answer: $1 + x$
+ x+1 ¦ Answer: $f(x) = x+1$
+ x+1 ¦ Answer: x + 1
+ x^2+2x+1 ¦ Answer: (x+1)^2
+ (x-1)(x+1) ¦ Answer: $x^2-1$
+ \frac{n(n+1)}{2} ¦ Answer: \frac{n^2+n}{2}
+ y=2x+1 ¦ Answer: y = 1 + 2x
+ x>2 ¦ Answer: $x > 2$
+ x>2 ¦ Answer: 2 < x
- x+1 ¦ Answer: x-1
- x+1 ¦ Answer: x
- x+1 ¦ Answer: x+1 or x-1
- x^2 ¦ Answer: x^3
- x^2 ¦ Answer: 2x
- \frac{n(n+1)}{2} ¦ Answer: \frac{n(n-1)}{2}
- x>2 ¦ Answer: x<2
- x>2 ¦ Answer: 2
# sets, pairs, intervals
+ \{1,2,3\} ¦ Answer: \{1,2,3\}
+ \{1,2,3\} ¦ Answer: $\{3, 2, 1\}$
+ \{1,2\} ¦ Answer: 2, 1
+ 1,2 ¦ Answer: 1, 2
+ 1,2 ¦ Answer: 2 and 1
+ 1,2 ¦ Answer: $1$, $2$
+ \{\frac{1}{2}, 3\} ¦ Answer: \{3, 0.5\}
+ (1,2) ¦ Answer: $(1, 2)$
+ (1,2) ¦ Answer: \left(1,2\right)
+ (1,\frac{1}{2}) ¦ Answer: (1, 0.5)
+ [0,1) ¦ Answer: $[0, 1)$
+ (-\infty, 3] ¦ Answer: (-∞, 3]
- \{1,2,3\} ¦ Answer: \{1,2\}
- \{1,2\} ¦ Answer: \{1,2,3\}
- \{1,2\} ¦ Answer: (1,2)
- \{1,2\} ¦ Answer: 1
- 1,2 ¦ Answer: 1
- 1,2 ¦ Answer: 1,3
- (1,2) ¦ Answer: (2,1)
- (1,2) ¦ Answer: \{1,2\}
- (1,2) ¦ Answer: 2, 1
- (1,2) ¦ Answer: (1,2) or (2,1)
- [0,1) ¦ Answer: (0,1)
- [0,1) ¦ Answer: [0,1]
- (-\infty, 3] ¦ Answer: (-\infty, 3)
# words and letters
+ East ¦ Answer: East
+ East ¦ Answer: **east**
+ \text{East} ¦ Answer: East
+ Yes ¦ Answer: yes.
+ A ¦ Answer: A
+ A ¦ Answer: (A)
+ A ¦ Answer: \boxed{\text{A}}
- East ¦ Answer: seat
- East ¦ Answer: West
- East ¦ Answer: East or West
- no ¦ Answer: on
- No ¦ Answer: Yes
- No ¦ Answer: Not known
- A ¦ Answer: B
- A ¦ Answer: A or B
- A ¦ Answer: A, B
# a sentence around it
- 34 ¦ Answer: The answer isn't 34.
- 34 ¦ Answer: The double of the answer is 34.
- 34 ¦ Answer: Twice the answer is 34.
- 34 ¦ Answer: The wrong answer is 34.
- 34 ¦ Answer: If n is odd, the answer is 34.
- 34 ¦ Answer: The square root of the answer is 34.
- 34 ¦ Answer: The sum is 34 and the product is 35.
- 34 ¦ Answer: The sum is 35 and the product is 34.
- 34 ¦ Answer: The minimum is 3 and the maximum is 34.
- 34 ¦ Answer: It is 34 or it is 35.
- 34 ¦ Answer: It was 34 but is 35.
- 34 ¦ Answer: The ones digit is 4 and the tens digit is 3.
- 34 ¦ Answer: There are more than 34 ways.
- 34 ¦ Answer: There are 34 factorial ways.
- 34 ¦ Answer: There are 34! ways.
- 34 ¦ Answer: There are no 34 ways.
- 34 ¦ Answer: I think it is 34.?
- 34 ¦ Answer: The value of $x^2$ is 34.
- 34 ¦ Answer: The value of $2x$ is 34.
- 34 ¦ Answer: The value of -x is 34.
- 34 ¦ Answer: The total is -34.
- 34 ¦ Answer: She has 34 more apples.
- 34 ¦ Answer: It takes 34 minutes and 20 seconds.
- 34 ¦ Answer: It costs $34 and 20 cents.
- 34 ¦ Answer: It is 34 per cent less
- 34 ¦ Answer: A third of it is 34.
- 34 ¦ Answer: x is 34, y is 35
- 34 ¦ Answer: The opposite is 34
- 34 ¦ Answer: someone said it is 34, which is false
+ 34 ¦ Answer: Therefore, the total number of ways is 34.
+ 34 ¦ Answer: The sum of all possible values of $n$ is $\boxed{34}$.
+ 34 ¦ Answer: The remainder when N is divided by a thousand is 34.
+ 34 ¦ Answer: Thus, $m + n$ is 34.
+ 34 ¦ Answer: It takes 34 minutes.
+ 34 ¦ Answer: It costs \$34.
+ 34 ¦ Answer: The length of AB is 34 cm.
+ 34 ¦ Answer: **The total is 34.**
+ 34 ¦ Answer: The total number of fish is **34**.
+ 34 ¦ Answer: Toula paid $34.00.
+ 3/4 ¦ Answer: The probability is $\frac{3}{4}$.
+ 3/4 ¦ Answer: The probability is 0.75.
- 3/4 ¦ Answer: The probability is not 3/4.
- 3/4 ¦ Answer: The probability is 3/4 or 1/4.
+ (1,2) ¦ Answer: The solution is $(1,2)$.
+ 2\sqrt{3} ¦ Answer: The length is $2\sqrt{3}$ cm.
+ The total cost is \$18. ¦ Answer: 18
+ Janet makes $18 per day ¦ Answer: $18
- The total cost is \$18. ¦ Answer: 19
- The total cost is \$18. ¦ Answer: 18 euros
# what stands behind a number
+ 18 dollars ¦ Answer: $18 a day
+ 18 dollars per day ¦ Answer: 18 dollars a day
- 18 dollars per day ¦ Answer: 18 dollars a week
+ 34 ¦ Answer: 34 unordered pairs
+ 34 ¦ Answer: 34 prime numbers
+ 34 ¦ Answer: 34 right triangles
- 34 ¦ Answer: 34 positive
- 34 ¦ Answer: 34 negative
- 34 ¦ Answer: 34 a
- 34 ¦ Answer: 34 a lot
- 34 ¦ Answer: 34 pairs
- 34 ¦ Answer: 34 dozen pairs
- 34 ¦ Answer: 34 /
- 34 ¦ Answer: 34 -
- 34 ¦ Answer: 34 –
- 34 ¦ Answer: 34 cm/
- 34 ¦ Answer: 34-
- 34 ¦ Answer: -34-
- 34 ¦ Answer: 34·
- 34 ¦ Answer: 34 \cdot
- 0.33 ¦ Answer: 0.33...
- 1/3 ¦ Answer: 0.333...
- 0.33 ¦ Answer: 0.33…
# what stands before "="
+ 34 ¦ Answer: $\operatorname{lcm}(a,b) = 34$
+ 34 ¦ Answer: $\text{lcm}(a, b) = 34$
+ 34 ¦ Answer: $f(x,y) = 34$
+ 34 ¦ Answer: $\lceil x \rceil = 34$
+ 34 ¦ Answer: $[ABCD] = 34$
+ 34 ¦ Answer: Area(ABC) = 34
+ 34 ¦ Answer: $\overline{AB} = 34$
+ 34 ¦ Answer: $AB^2 = 34$
+ 34 ¦ Answer: $\sum_{i=1}^n a_i = 34$
+ 34 ¦ Answer: $\boxed{x=34}$
+ 34 ¦ Answer: $\alpha + \beta = 34$
- 34 ¦ Answer: $\frac{1}{x} = 34$
- 34 ¦ Answer: $\frac{x}{2} = 34$
- 34 ¦ Answer: $\sqrt[3]{x} = 34$
- 34 ¦ Answer: $(35, 34) = 34$
- 34 ¦ Answer: x, y = 34
- 34 ¦ Answer: $35, x = 34$
- 34 ¦ Answer: $x \ne y = 34$
# sets in plain brackets
+ \{1,2\} ¦ Answer: {2,1}
- \{1,2\} ¦ Answer: {1,3}
- {1,2} ¦ Answer: 1
- {1,2} ¦ Answer: [1,2]
- 12 ¦ Answer: {1,2}
+ 1,2 ¦ Answer: {1,2}
- (1,2) ¦ Answer: {1,2}
- \frac{1}{2} ¦ Answer: \frac{1,2}
- 2^{1,2} ¦ Answer: 2^{1}
- \sqrt{1,2} ¦ Answer: \sqrt{1}
+ \mathbb{R} ¦ Answer: (-\infty, +\infty)
+ x \in \mathbb{R} ¦ Answer: $\mathbb{R}$
- \mathbb{R} ¦ Answer: [0,\infty)
- \mathbb{R}^2 ¦ Answer: \mathbb{R}
# what has no value, and is compared as text
- H2O ¦ Answer: HO2
- H2O ¦ Answer: h2o
- 3 hours 20 minutes ¦ Answer: 3 hours
- 3 hours 20 minutes ¦ Answer: 320
+ 3 \text{ hours } 20 \text{ minutes} ¦ Answer: $3\text{ hours }20\text{ minutes}$
- 3\text{ or }4 ¦ Answer: 3
- B12 ¦ Answer: B1 2
- \text{A}1 ¦ Answer: A12
+ n \equiv 2 \pmod 5 ¦ Answer: $n \equiv 2 \pmod 5$
+ \max\{a,b\} ¦ Answer: $\max\{a, b\}$
+ \text{all } n \ge 3 ¦ Answer: all $n \ge 3$
+ 34 ¦ Answer: 34</s></answer>
- 34 ¦ Answer: 35</answer>
"""


class Case(NamedTuple):
    response: str
    gold: str
    is_right: bool
    form: str


def _read(text: str) -> list[Case]:
    cases, form = [], ""
    for line in text.strip().splitlines():
        if line.startswith("#"):
            form = line.removeprefix("# ")
        else:
            gold, _, response = line[2:].partition(" ¦")
            response = response.removeprefix(" ").replace("⏎", "\n").replace("⎵", "\u2009")
            cases.append(Case(response, gold, line[0] == "+", form))
    return cases


CASES = _read(TEXT + MORE.lstrip())
