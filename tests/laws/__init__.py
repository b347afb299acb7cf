"""The laws of the core, checked on random programs.

A law is a sentence such as "a program means the same under `nnx.jit` as in Python". The machine makes random programs,
runs each with nnx, and compares the result with the meaning of the program. A few hundred run in the suite (`test_laws.py`).
This command runs as many as you want, prints how many ran for each law, and exits with 1 if one failed::

    python -m tests.laws --programs 100000 --seed 1
    python -m tests.laws --programs 1 --seed 57 --law 4      # one program again

A program that fails is made smaller first, and printed as source with the expected result and the result of nnx.

How it is built
---------------

A program is data: a prelude, which makes modules, and steps (`program.py`). Both are trees of `Line` and `Block`. So
a program prints as Python, and shrinks by dropping lines, taking blocks apart and replacing calls (`shrink.py`).

The same text runs twice. `library.py` gives it the names that it uses: once from nnx, and once from plain Python, where a Ref is an
object with a `value`, `jit` does nothing, `cond` is an `if` and `scan` a `for`, `vmap` calls the function for each lane, and `grad`
computes with dual numbers (`reference.py`). After each step, everything visible is recorded as plain data: every
name, every object once and how it was reached, every value, every setting with its type, every attribute of a class. The two
records must be equal.

Programs compute with `mix(a, b)`, which depends on the order of a and b and stays small; `total(tree)`, a number that depends on
a whole tree with its sharing and settings; `bump(tree)`, which writes every Ref; and `tag(setting)`, a number for the type and
value of a setting. So a wrong order, a lost alias or an old setting shows up as a wrong number.

An error of nnx is allowed only if `Program.may` names it, with a reason. Then nothing may have changed. The
generators name such an error only if a program does something that cannot be expressed, and most programs must succeed.

The laws
--------

1, 2, 9. `trees.py` makes a random tree and runs one check on it: objects, trees and modules in the place of leaves; split, merge,
clone and update, with one wrong entry; and the habits of other libraries (`neighbours.py`): partition and combine, closed-over
masks, axes as a tree, leaves kept for later, a pytree that flattens a module itself, `jax.hessian`, `lower().compile()`.

3, 4. `world.py` makes modules that share Refs, arrays and each other, with cycles, lists, dicts, tuples and settings. `bodies.py` makes
statements: reads, writes, swaps, surgery. `regions.py` and `loops.py` put them into transformations of transformations: `jit`, `remat`, `checkify`,
methods, `cond`, `switch`, `scan`, `map`, `fori_loop`, `while_loop`, `vmap`, `grad`, with modules passed by position, keyword, default
and partial, carried, sliced and closed over. Between calls plain Python changes the modules. Law 4 has more loops.

5. `changes.py` makes a function (compiled, or an eager loop or branch) that reaches a module through some steps (`routes.py`: a
cell, a global, an attribute of an object, of its class or of a base class, a list, a dict, a default, a partial, a helper, a
method), and changes those steps between calls.

6. `changes.py` replaces settings with their twins: values that Python calls equal, listed in `things.TWINS`.

7. `failures.py` makes a function in a program of law 3 or 4 raise, while it is traced or while it runs. Nothing may have
changed, and afterwards no Ref, module, array or tracer of the program may be alive.

8. `costs.py` calls a function again and again, eager or compiled. After the third call nothing is traced or
compiled, and the number of live objects of each class does not grow.

How to extend it
----------------

A statement: a case in `Bodies.simple` or `Bodies.surgery`. A transformation: its meaning in `reference.py`, its name in both classes of
`library.py` and in `Library.namespace`, and a function in `regions.py` that is listed in `kinds`. A change between calls: a line in
`Routes.changes`. A way to reach a module: a method of `Routes`, listed in `_ROUTES`. A setting: a value in `TWINS`. A habit of another
library: a function in `neighbours.py` that returns a description of the fault, or None. If nnx may raise, add the error and its reason to `may`.
"""
