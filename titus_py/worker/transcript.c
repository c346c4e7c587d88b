/*
 * Hands keyd the messages of a TLS 1.3 handshake, as they were sent: it signs their hash alone.
 *
 * Run by workers, called by OpenSSL (SSL_CTX_set_msg_callback(3)) with each message. The client's
 * first one is left out: the parent has handed keyd that. When the server's Certificate has been
 * sent, all others go to keyd in one packet (keyd/protocol.py), before the request to sign. A
 * handshake of TLS 1.2 is not for this. A worker has one connection: one packet is enough. In C,
 * because a callback in Python needs a page of memory that is writable and executable.
 */

#include <Python.h>

#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>

#define TLS13 0x0304
/* RFC 8446 §5.1, §4. */
#define HANDSHAKE 22
#define CERTIFICATE 11
/* keyd/protocol.py */
#define MAX_FLIGHT_OCTETS (192 * 1024)
#define HEAD_OCTETS 2
static const unsigned char head[HEAD_OCTETS] = {1, 3};

static unsigned char packet[HEAD_OCTETS + MAX_FLIGHT_OCTETS];
static size_t length;
/* keyd's, until the packet is sent; -1 if nobody is to be told. */
static int channel = -1;
static bool begun, too_long;

static void send_packet(void)
{
	/* Nothing but the head, where it is not to be had: keyd then says why it does not sign. */
	if (too_long || send(channel, packet, length, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		send(channel, head, sizeof head, MSG_DONTWAIT | MSG_NOSIGNAL);
	channel = -1;
}

static void note(int sent, int version, int type, const void *octets, size_t count, const void *ssl,
		 const void *argument)
{
	const unsigned char *message = octets;

	(void)ssl;
	(void)argument;
	if (channel < 0 || type != HANDSHAKE || count == 0)
		return;
	if (!begun) {
		begun = true;
		return;
	}
	if (count > sizeof packet - length) {
		too_long = true;
	} else {
		memcpy(packet + length, message, count);
		length += count;
	}
	if (!sent || message[0] != CERTIFICATE)
		return;
	if (version == TLS13)
		send_packet();
	channel = -1;
}

static PyObject *tell(PyObject *module, PyObject *descriptor)
{
	long number = PyLong_AsLong(descriptor);

	(void)module;
	if (number == -1 && PyErr_Occurred())
		return NULL;
	channel = (int)number;
	memcpy(packet, head, sizeof head);
	length = sizeof head;
	begun = too_long = false;
	Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
	{"tell", tell, METH_O, "tell(descriptor): whom to tell of the handshake that comes next."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "titus_py.worker.transcript",
	.m_size = 0,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit_transcript(void);
PyMODINIT_FUNC PyInit_transcript(void)
{
	PyObject *module = PyModule_Create(&definition);
	PyObject *address = module != NULL ? PyLong_FromVoidPtr((void *)note) : NULL;

	if (address == NULL || PyModule_AddObjectRef(module, "CALLBACK", address) < 0)
		Py_CLEAR(module);
	Py_XDECREF(address);
	return module;
}
