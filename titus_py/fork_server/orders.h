/*
 * The parent's orders and their answers: Fork and Forked of titus_py/between/messages.py.
 */

#ifndef TITUS_PY_FORK_SERVER_ORDERS_H
#define TITUS_PY_FORK_SERVER_ORDERS_H

#include <stdint.h>
#include <string.h>

/*
 * One buffer is both the order and its answer, so that the uid is nowhere else in memory. Each
 * worker inherits that memory, and is to find no uid in it but its own.
 */
struct order {
	unsigned char message[1 + 8 + 4]; /* the kind, the uid; in the answer, a pid or an errno */
	int descriptors[2];               /* of the worker's report, and of its socket */
};

static inline int64_t ordered_uid(const struct order *order)
{
	int64_t uid;
	memcpy(&uid, order->message + 1, sizeof(uid));
	return uid;
}

/* Returns 1; 0 at end of file; or -1 with errno, which is EBADMSG if it is no order. */
int take_order(int parent, struct order *order);

/* Send a worker's pid and pidfd or, if pid is negative, an errno. Returns -1 with errno. */
int answer_order(int parent, struct order *order, long pid, int pidfd, int error);

#endif
