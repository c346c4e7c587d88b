/*
 * Takes an order, answers it.
 *
 * Run by the fork server, for forking.c: see there for why it is in C. It trusts the parent. An
 * order that is not as it should be is refused whole all the same: descriptors that belong to
 * another order would give two workers the same socket.
 */

#include "orders.h"

#include <errno.h>
#include <stddef.h>
#include <sys/socket.h>

#define ORDER_OCTETS 9

union ancillary {
	struct cmsghdr header;
	char octets[CMSG_SPACE(2 * sizeof(int))];
};

int take_order(int parent, struct order *order)
{
	union ancillary ancillary;
	struct iovec io = {order->message, ORDER_OCTETS};
	struct msghdr message = {.msg_iov = &io,
	                         .msg_iovlen = 1,
	                         .msg_control = &ancillary,
	                         .msg_controllen = sizeof(ancillary)};
	const ssize_t length = recvmsg(parent, &message, MSG_CMSG_CLOEXEC);
	if (length <= 0)
		return (int)length;
	if (length != ORDER_OCTETS || order->message[0] != 'W' ||
	    (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0 ||
	    message.msg_controllen < CMSG_LEN(sizeof(order->descriptors)) ||
	    ancillary.header.cmsg_len != CMSG_LEN(sizeof(order->descriptors)) ||
	    ancillary.header.cmsg_type != SCM_RIGHTS) {
		errno = EBADMSG;
		return -1;
	}
	memcpy(order->descriptors, CMSG_DATA(&ancillary.header), sizeof(order->descriptors));
	return 1;
}

int answer_order(int parent, struct order *order, long pid, int pidfd, int error)
{
	const uint32_t number = pid < 0 ? (uint32_t)error : (uint32_t)pid;
	union ancillary ancillary = {.header = {.cmsg_len = CMSG_LEN(sizeof(pidfd)),
	                                        .cmsg_level = SOL_SOCKET,
	                                        .cmsg_type = SCM_RIGHTS}};
	struct iovec io = {order->message, sizeof(order->message)};
	struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1};
	order->message[0] = pid < 0 ? 'E' : 'P';
	memcpy(order->message + ORDER_OCTETS, &number, sizeof(number));
	if (pid > 0) {
		memcpy(CMSG_DATA(&ancillary.header), &pidfd, sizeof(pidfd));
		message.msg_control = &ancillary;
		message.msg_controllen = CMSG_SPACE(sizeof(pidfd));
	}
	ssize_t sent;
	do
		sent = sendmsg(parent, &message, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	return sent < 0 ? -1 : 0;
}
