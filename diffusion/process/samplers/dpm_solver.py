r"""DPM-Solver++, multistep (arXiv:2211.01095): 2M, 3M and SDE-2M.

In lambda = log(alpha/sigma) the probability-flow ODE, with D(x, t) the x_0 estimate, is solved by

    x_s = (sigma_s/sigma_t) x_t + sigma_s int_{lambda_t}^{lambda_s} e^lambda D dlambda
                                                                       (1), DPM-Solver++ eq. 8

Let h = lambda_s - lambda_t, D_0 the estimate here, D_1, D_2 those at the two levels before, at
distances h r_0 and h (r_0 + r_1). D expanded about lambda_t in u = (lambda - lambda_t)/h,

    D = D_0 + u D' + u^2/2 D'',   int: alpha_s (p_1 D_0 + p_2 D' + p_3 D''),                  (2)
    p_1 = 1 - e^{-h},   p_2 = 1 - p_1/h,   p_3 = 1/2 - p_2/h,

gives order 1 (DDIM), order 2 with D' = (D_0 - D_1)/r_0, and order 3 with

    a = (D_0 - D_1)/r_0,   b = (D_1 - D_2)/r_1,
    D' = a + r_0/(r_0 + r_1) (a - b),   D'' = 2 (a - b)/(r_0 + r_1).                          (3)

Two habits of the authors' code are kept: 2M takes p_1/2 for p_2 (its Algorithm 2, "midpoint"; they
agree to the order of the method), and 3M takes (a - b)/(r_0 + r_1), half of D''. The half leaves an
error of the third order in one step, so that 3M as published converges with order 2, with a smaller
constant; ``exact=True`` takes D'' whole and converges with order 3.

The reverse SDE (their eq. 19-20), with q_1 = 1 - e^{-2h}, is solved by

    x_s = (sigma_s/sigma_t) e^{-h} x_t + alpha_s q_1 (D_0 + (D_0 - D_1)/(2 r_0))
          + sigma_s sqrt(q_1) z                                                               (4)

Orders rise as estimates arrive and fall at the end (``lower_order_final``): the step to clean data
has infinite h and is of order 1; below 15 steps the last is of order 1 wherever it leads and the
one before of order at most 2. A first level without signal has infinite h too; the limits hold.
"""
