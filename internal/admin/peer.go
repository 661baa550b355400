package admin

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Bounds of what a process of another uid can cost.
const (
	foreignAtOnce  = 8
	foreignTimeout = time.Second
)

// peerListener passes on only connections whose peer may use the API; the HTTP
// server never sees the others.
type peerListener struct {
	net.Listener
	uid  uint32
	log  hclog.Logger
	busy chan struct{} // a slot for each stranger that is being answered
	wg   sync.WaitGroup
}

func newPeerListener(l net.Listener, uid uint32, log hclog.Logger) *peerListener {
	return &peerListener{Listener: l, uid: uid, log: log, busy: make(chan struct{}, foreignAtOnce)}
}

func (l *peerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(c)
		if err == nil && (uid == l.uid || uid == 0) {
			return c, nil
		}
		if err != nil {
			l.log.Warn("admin socket: connection refused: cannot tell whose it is", "error", err)
		} else {
			l.log.Warn("admin socket: connection refused: another user's process", "uid", uid, "allowed", l.uid)
		}
		select {
		case l.busy <- struct{}{}:
			l.wg.Go(func() {
				refuse(c, uid, l.uid)
				<-l.busy
			})
		default:
			_ = c.Close()
		}
	}
}

// refuse answers 403 once the request is there: closing before that would reset
// the connection, and the client would never see why.
func refuse(c net.Conn, uid, allowed uint32) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(foreignTimeout))
	var buf [4096]byte
	_, _ = c.Read(buf[:])
	body, _ := json.Marshal(struct {
		Error errorBody `json:"error"`
	}{errorBody{codeForbidden, fmt.Sprintf("uid %d may not use this admin socket: only uid %d and root may", uid, allowed)}})
	_, _ = fmt.Fprintf(c, "HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
}

func peerUID(c net.Conn) (uint32, error) {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return 0, errors.New("not a Unix socket")
	}
	rc, err := uc.SyscallConn()
	if err != nil {
		return 0, err
	}
	var uid uint32
	var uerr error
	if err := rc.Control(func(fd uintptr) { uid, uerr = sys.PeerUID(int(fd)) }); err != nil {
		return 0, err
	}
	return uid, uerr
}
