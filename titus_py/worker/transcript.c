/*
 * Keeps the messages of a TLS 1.3 handshake, as they were sent, for keyd: it signs their hash alone.
 *
 * Run by workers, called by OpenSSL (SSL_CTX_set_msg_callback(3)) with each message. The client's
 * first one is left out: the parent has handed keyd that. Once the server's Certificate has been
 * sent, the provider takes all others for its request (keyd/provider/channel.c). A handshake of
 * TLS 1.2 is not for this. A worker has one connection: one buffer is enough. In C, because a
 * callback in Python needs a page of memory that is writable and executable.
 */

#include <Python.h>

#include <stdbool.h>
#include <string.h>

#define TLS13 0x0304
/* RFC 8446 §5.1, §4. */
#define HANDSHAKE 22
#define CERTIFICATE 11
/* keyd/protocol.py; the provider writes its request in front. */
#define MAX_FLIGHT_OCTETS (192 * 1024)
#define ROOM_IN_FRONT 2048

static unsigned char buffer[ROOM_IN_FRONT + MAX_FLIGHT_OCTETS];
static size_t length;
/* Whether messages are kept, the first one has come, there was no room for one, all have come. */
static bool keeps, begun, too_long, whole;

static void note(int sent, int version, int type, const void *octets, size_t count, const void *ssl,
		 const void *argument)
{
	const unsigned char *message = octets;

	(void)ssl;
	(void)argument;
	if (!keeps || type != HANDSHAKE || count == 0)
		return;
	if (!begun) {
		begun = true;
		return;
	}
	if (count > MAX_FLIGHT_OCTETS - length) {
		too_long = true;
	} else {
		memcpy(buffer + ROOM_IN_FRONT + length, message, count);
		length += count;
	}
	if (sent && message[0] == CERTIFICATE) {
		keeps = false;
		whole = version == TLS13;
	}
}

/* The messages, once, or NULL; of none that were too long, keyd says why it does not sign. */
static unsigned char *take(size_t *count)
{
	if (!whole)
		return NULL;
	whole = false;
	*count = too_long ? 0 : length;
	return buffer + ROOM_IN_FRONT;
}

static PyObject *begin(PyObject *module, PyObject *unused)
{
	(void)module;
	(void)unused;
	length = 0;
	keeps = true;
	begun = too_long = whole = false;
	Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
	{"begin", begin, METH_NOARGS, "begin(): the handshake that comes next is for keyd to know."},
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

	if (module != NULL
	    && (PyModule_AddObject(module, "CALLBACK", PyLong_FromVoidPtr((void *)note)) < 0
		|| PyModule_AddObject(module, "TAKE", PyLong_FromVoidPtr((void *)take)) < 0))
		Py_CLEAR(module);
	return module;
}
