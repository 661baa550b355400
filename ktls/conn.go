package ktls

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"time"
)

// MaxQueued is the largest number of plaintext bytes QueueWrite keeps.
const MaxQueued = 1 << 20

// Conn is an established TLS session over one of the record layers.
type Conn struct {
	sock  Socket
	layer recordLayer
}

var errTODO = errors.New("not built yet")

func Server(ctx context.Context, c *net.TCPConn, cfg *Config) (*Conn, error) { return nil, errTODO }
func Client(ctx context.Context, c *net.TCPConn, cfg *Config) (*Conn, error) { return nil, errTODO }
func NewListener(inner *net.TCPListener, cfg *Config) net.Listener          { return inner }
func Import(sock Socket, facts, record []byte) (*Conn, error)               { return nil, errTODO }

func (c *Conn) Read(p []byte) (int, error)           { return 0, errTODO }
func (c *Conn) Write(p []byte) (int, error)          { return 0, errTODO }
func (c *Conn) Close() error                         { return errTODO }
func (c *Conn) CloseWrite() error                    { return errTODO }
func (c *Conn) LocalAddr() net.Addr                  { return nil }
func (c *Conn) RemoteAddr() net.Addr                 { return nil }
func (c *Conn) SetDeadline(t time.Time) error        { return errTODO }
func (c *Conn) SetReadDeadline(t time.Time) error    { return errTODO }
func (c *Conn) SetWriteDeadline(t time.Time) error   { return errTODO }
func (c *Conn) ConnectionState() tls.ConnectionState { return tls.ConnectionState{} }
func (c *Conn) Layer() Layer                         { return LayerSoftware }
func (c *Conn) LayerReason() string                  { return "" }
func (c *Conn) Unread(p []byte)                      {}
func (c *Conn) Buffered() int                        { return 0 }
func (c *Conn) QueueWrite(p []byte) error            { return errTODO }
func (c *Conn) Pending() int                         { return 0 }
func (c *Conn) Flush() error                         { return errTODO }
func (c *Conn) Socket() Socket                       { return c.sock }
func (c *Conn) KeyUpdate(requestPeer bool) error     { return errTODO }
func (c *Conn) Detach() (Socket, *State, error)      { return nil, nil, errTODO }

// State is a detached session.
type State struct{}

func (s *State) MarshalFacts() ([]byte, error)   { return nil, errTODO }
func (s *State) MarshalRecord() ([]byte, error)  { return nil, errTODO }
func (s *State) MarshalSecrets() ([]byte, error) { return nil, errTODO }
func (s *State) Layer() Layer                    { return LayerSoftware }
func (s *State) Wipe()                           {}
