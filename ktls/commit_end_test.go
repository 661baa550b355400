package ktls

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"
)

// An owner that dies with an alert in its hands, of which it has told nobody: the next one
// knows whether the peer had said close_notify, and a FIN alone is no clean end.
func TestEndInTheHandsOfADeadOwner(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		for _, version := range []uint16{v13, tls.VersionTLS12} {
			suite := uint16(gcm)
			if version == tls.VersionTLS12 {
				suite = tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
			}
			for _, tc := range []struct {
				name  string
				alert []byte
				take  bool
				want  error
			}{
				{"close_notify", []byte{levelWarning, byte(alertCloseNotify)}, true, io.EOF},
				{"close_notify, not taken", []byte{levelWarning, byte(alertCloseNotify)}, false, io.EOF},
				{"user_canceled", []byte{levelWarning, byte(alertUserCanceled)}, true, ErrTruncated},
				{"none", nil, false, ErrTruncated},
			} {
				for _, uncommitted := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s, %s, uncommitted %v", tls.VersionName(version), tc.name, uncommitted), func(t *testing.T) {
						s := newScripted(t, layer, version, suite)
						o := &unreadOwner{t: t, ta: newTestArena(t), c: s.conn, free: func() {}}
						if err := o.move(false); err != nil {
							t.Fatal(err)
						}
						defer func() { _ = o.c.Close(); o.free() }()
						s.sendRaw(s.seal(typeData, []byte("input")))
						buf := make([]byte, 100)
						if n, err := o.c.Read(buf); err != nil || string(buf[:n]) != "input" {
							t.Fatalf("%q, %v", buf[:n], err)
						}
						if !uncommitted {
							if _, err := o.c.Commit(len("input"), nil, nil, true); err != nil {
								t.Fatal(err)
							}
						}
						if tc.alert != nil {
							s.sendRaw(s.seal(typeAlert, tc.alert))
						}
						if tc.take {
							into, err := o.c.commits.room()
							if err != nil {
								t.Fatal(err)
							}
							if _, ctl, err := o.c.layer.read(into); err != nil || ctl.typ != typeAlert {
								t.Fatalf("record of type %d, %v", ctl.typ, err)
							}
						}
						if err := o.move(true); err != nil {
							t.Fatal(err)
						}
						if err := s.c.CloseWrite(); err != nil {
							t.Fatal(err)
						}
						_ = o.c.SetReadDeadline(time.Now().Add(testWait))
						got, err := io.ReadAll(o.c)
						if err == nil {
							err = io.EOF
						}
						if !errors.Is(err, tc.want) || string(got) != map[bool]string{true: "input"}[uncommitted] {
							t.Errorf("%q, %v; want %v", got, err, tc.want)
						}
					})
				}
			}
		}
	})
}
