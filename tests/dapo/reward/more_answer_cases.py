"""More cases of the labelled set: see answer_cases."""

MORE = r"""
# data sets' own ground truths
+ 18 ¦ Answer: The total cost is \$18.
+ 18 ¦ Answer: Janet makes \$18 per day.
+ 34 ¦ Answer: 34 ordered pairs
+ 34 ¦ Answer: 34 positive integers
+ 34 ¦ Answer: $\gcd(a,b) = 34$
+ 34 ¦ Answer: $\lfloor x \rfloor = 34$
+ 34 ¦ <answer>Answer: 34</answer>
- 34 ¦ Answer: 34 fails
- 34 ¦ Answer: 34...
- 34 ¦ Answer: $\sqrt{x} = 34$
+ \{1,2,3\} ¦ Answer: {3, 2, 1}
+ (-\infty,\infty) ¦ Answer: $\mathbb{R}$
+ 3 \text{ hours } 20 \text{ minutes} ¦ Answer: 3 hours 20 minutes
- 3 hours 20 minutes ¦ Answer: 3 hours 30 minutes
+ B ¦ Answer: The correct answer is (B).
+ 12 ¦ Answer: The answer is therefore 12.
- 12 ¦ Answer: He paid \$12 too much.
- 12 ¦ Answer: 12 loss
- 7 ¦ Answer: Either it is 7
- 7 ¦ Answer: The value of $\sqrt{x}$ is 7.
- 12 m/s ¦ Answer: 12 m
- 12 ¦ Answer: 12 basis points
+ 2516_8 ¦ Answer: $2516_{8}$
- 2516_8 ¦ Answer: $2516_9$
- 2516_8 ¦ Answer: $2516$
+ \begin{cases} x & x>0 \\ 0 & x<0 \end{cases} ¦ Answer: $\begin{cases} x & x>0 \\ 0 & x<0 \end{cases}$
- \begin{cases} x & x>0 \\ 0 & x<0 \end{cases} ¦ Answer: $\begin{cases} x & x>0 \\ 1 & x<0 \end{cases}$
+ H2O ¦ Answer: H2O
- H2O ¦ Answer: H2O2
# a name that changes the value or denies it
- 34 ¦ Answer: twice = 34
- 34 ¦ Answer: double = 34
- 34 ¦ Answer: half = 34
- 34 ¦ Answer: answer/2 = 34
- 34 ¦ Answer: -answer = 34
- 34 ¦ Answer: −answer = 34
- 34 ¦ Answer: the answer squared = 34
- 34 ¦ Answer: x isn't = 34
- 34 ¦ Answer: x isn’t = 34
- 34 ¦ Answer: wrong = 34
- 34 ¦ Answer: the wrong answer = 34
- 34 ¦ Answer: 2 answers = 34
- 34 ¦ Answer: answer - 1 = 34
- 34 ¦ Answer: answer^2 = 34
- 34 ¦ Answer: answer² = 34
- 34 ¦ Answer: answer! = 34
- 34 ¦ Answer: (answer)/2 = 34
- 34 ¦ Answer: 2ans = 34
- 34 ¦ Answer: $\text{answer}/2 = 34$
- 34 ¦ Answer: $\frac{\text{answer}}{2} = 34$
- 34 ¦ Answer: $-\text{answer} = 34$
- 34 ¦ Answer: $\text{twice } x = 34$
- 34 ¦ Answer: $180 - \angle A = 34$
- 34 ¦ Answer: two times x = 34
- 34 ¦ Answer: area plus one = 34
- 34 ¦ Answer: the number of apples squared = 34
- 34 ¦ Answer: the square root of x = 34
+ 34 ¦ Answer: the answer = 34
+ 34 ¦ Answer: final answer = 34
+ 34 ¦ Answer: ans = 34
+ 34 ¦ Answer: $\text{answer} = 34$
+ 34 ¦ Answer: area = 34
+ 34 ¦ Answer: area + perimeter = 34
+ 34 ¦ Answer: x-coordinate = 34
+ 34 ¦ Answer: speed in km/h = 34
+ 34 ¦ Answer: number of 3-digit integers = 34
+ 34 ¦ Answer: 3-digit numbers = 34
+ 34 ¦ Answer: 10th term = 34
+ 34 ¦ Answer: No. of ways = 34
+ 34 ¦ Answer: number of wrong answers = 34
+ 34 ¦ Answer: number of negative roots = 34
+ 34 ¦ Answer: remainder when N is divided by 1000 = 34
+ 34 ¦ Answer: larger root = 34
+ 34 ¦ Answer: $P(X = 3) = 34$
+ 34 ¦ Answer: $\angle A + \angle B = 34$
+ 34 ¦ Answer: $E[X - 1] = 34$
- 1/2 ¦ Answer: twice = 1/2
- 1/2 ¦ Answer: half of x = 1/2
- 1/2 ¦ Answer: x isn't = 1/2
- 1/2 ¦ Answer: the answer squared = 1/2
- 1/2 ¦ Answer: $\frac{x}{2} = 1/2$
- 1/2 ¦ Answer: $\sqrt{x} = 1/2$
- 1/2 ¦ Answer: $\binom{n}{2} = 1/2$
+ 1/2 ¦ Answer: the answer = 1/2
+ 1/2 ¦ Answer: $\frac{m}{n} = 1/2$
+ 1/2 ¦ Answer: P(A or B) = 1/2
+ 1/2 ¦ Answer: P(not A) = 1/2
+ 1/2 ¦ Answer: probability of no rain = 1/2
+ 1/2 ¦ Answer: P(X = 3) = 1/2
- 1,2 ¦ Answer: twice x = 1 or 2
+ 1,2 ¦ Answer: x = 1 or x = 2
- 34 ¦ Answer: The answer squared is 34.
# a multiple, a part or a function after a number
- 34 ¦ Answer: 34 tens
- 34 ¦ Answer: 34 kilo
- 34 ¦ Answer: 34 mega
- 34 ¦ Answer: 34 milli
- 34 ¦ Answer: 34 micro
- 34 ¦ Answer: 34 per mille
- 34 ¦ Answer: 34 billionths
- 34 ¦ Answer: 34 millionth
- 34 ¦ Answer: 34 twos
- 34 ¦ Answer: 34 nines
- 34 ¦ Answer: 34 myriads
- 34 ¦ Answer: 34 never
- 34 ¦ Answer: 34 cosx
- 34 ¦ Answer: 34 sinx
- 34 ¦ Answer: 34 lnx
- 34 ¦ Answer: 34 sinxcosx
+ 34 ¦ Answer: 34 tensors
+ 34 ¦ Answer: 34 tents
+ 34 ¦ Answer: 34 nights
+ 34 ¦ Answer: 34 kilos
+ 34 ¦ Answer: 34 kilometers
+ 34 ¦ Answer: 34 milliliters
+ 34 ¦ Answer: 34 micrograms
+ 34 ¦ Answer: 34 secs
+ 34 ¦ Answer: 34 logs
+ 34 ¦ Answer: 34 sinks
+ 34 ¦ Answer: 34 tanks
+ 34 ¦ Answer: 34 cosmonauts
+ 34 ¦ Answer: 34 experts
# marks of more chat templates
+ 34 ¦ Answer: 34[|endofturn|]
+ 34 ¦ Answer: 34<turn|>
+ 34 ¦ Answer: 34.<turn|>
+ 34 ¦ Answer: 34<|turn>
+ 34 ¦ Answer: 34[e~[
+ 34 ¦ Answer: 34]~b]
+ 34 ¦ Answer: 34<_end>
+ 34 ¦ Answer: 34<extra_id_0>
+ 34 ¦ Answer: 34<endofturn>
+ 34 ¦ Answer: 34[end_of_turn]
- 34 ¦ Answer: 34<5
- 34 ¦ Answer: 34[3, 4]
- 34 ¦ Answer: 34|x|
- 34 ¦ Answer: 34[|x|]
- 34 ¦ Answer: 34[
- 34 ¦ Answer: 34]
- 34 ¦ Answer: 34<x>
- 34 ¦ Answer: 34[e]
- 34 ¦ Answer: 34<a|>
- 34 ¦ Answer: 34<|a>
+ [3,4] ¦ Answer: [3, 4]
+ |x| ¦ Answer: |x|
+ x<5 ¦ Answer: x<5
"""
